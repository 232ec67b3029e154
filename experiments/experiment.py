"""An experiment: what its YAML may say, as one signature like that of any policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from attention.probe import AttentionProbe
from experiments.annotations import DefaultKind
from experiments.hardware import device, model
from experiments.sizes import Size
from sim.allocators import allocator
from sim.kv_precision import Precision
from sim.registry import Bounds, NonNegativeInt, PositiveInt
from sim.schedulers import scheduler
from sim.tiers.kinds import tier
from sim.tiers.tiered_store import TieredStore
from sim.timing import Transfers, timing
from workloads.workload import workload

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What a run stores; its summary is exact whatever is stored.

    Fields:
        requests: requests.parquet, one row per request.
        steps: steps.parquet, one row per engine step.
        memory: memory.parquet, one row per change of memory.
    """

    requests: bool = True
    steps: bool = True
    memory: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What one YAML file describes.

    Fields:
        name: Folder of the results; by default the name of the file.
        seed: Seed of all random streams.
        replications: Runs of every point, each with streams of its own.
        model: Name of a shipped model (kvsim list model), or its shape.
        device: Name of a shipped device (kvsim list device), or its figures.
        tensor_parallel: Devices that serve the model together.
        num_blocks: Blocks of KV memory, of the allocator's block size (16 if it has none).
        kv_memory: KV memory, where num_blocks is not given.
        memory_utilization: Share of the device's memory for weights and KV, where neither is given.
        kv_cache_dtype: Precision of the KV cache, with a scale for each token and head; by default the model's own.
        max_model_len: Longest sequence; by default the model's own. An output is cut to what fits, a longer
            prompt is refused.
        workload: Where requests come from.
        allocator: Who owns which KV slots.
        scheduler: Who runs in the next step.
        timing: How long a step takes.
        transfers: How long moving blocks takes.
        tiers: Memories behind the device where cached prefixes go on, from near to far.
        offload: What is written to the tiers, and what is loaded from them.
        probe: Steps checked with real attention, or false for none.
        record: Tables that a run stores.
        sweep: Dotted paths, each with a list of values; those under zip vary together, the others cross them.
        plugins: Python files that register policies; a relative path starts at the YAML's folder.
    """

    name: str | None = None
    seed: NonNegativeInt = 0
    replications: PositiveInt = 1
    model: Annotated[Settings, model, DefaultKind("custom")] | None = None
    device: Annotated[Settings, device, DefaultKind("custom")] | None = None
    tensor_parallel: PositiveInt = 1
    num_blocks: PositiveInt | None = None
    kv_memory: Size | None = None
    memory_utilization: Annotated[float, Bounds(gt=0, le=1)] = 0.9
    kv_cache_dtype: Precision | None = None
    max_model_len: PositiveInt | None = None
    workload: Annotated[Settings, workload, DefaultKind("synthetic")]
    allocator: Annotated[Settings, allocator]
    scheduler: Annotated[Settings, scheduler]
    timing: Annotated[Settings, timing]
    transfers: Annotated[Settings, Transfers] = field(default_factory=dict)
    tiers: list[Annotated[Settings, tier]] | None = None
    offload: Annotated[Settings, TieredStore] = field(default_factory=dict)
    probe: Annotated[Settings, AttentionProbe] | bool = field(default_factory=dict)
    record: Annotated[Settings, Record] = field(default_factory=dict)
    sweep: dict[str, Any] | None = None
    plugins: list[Path] = field(default_factory=list)
