"""Building: the settings of a point turned into the objects that a simulation takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path as File
from typing import Any

from attention.probe import AttentionProbe
from experiments import hardware
from experiments.annotations import alternatives, fields_of, file_in, registry_in, section_in
from experiments.capacity import BLOCK_SIZE, make_capacity, wrong
from experiments.experiment import Experiment
from experiments.figures import further_figures
from experiments.mistakes import Mistake, Mistakes, Path
from sim.allocators import Allocator, Capacity, allocator
from sim.errors import ProbeError, UserError
from sim.hardware import Device, Model
from sim.recorder import Recorder, Sink
from sim.registry import Registry
from sim.schedulers import Scheduler, scheduler
from sim.simulation import simulate
from sim.tiers.kinds import tier
from sim.tiers.tiered_store import TieredStore
from sim.timing import StepTime, Transfers, timing
from workloads.streams import Streams
from workloads.workload import workload


def run(
    experiment: Experiment, replication: int, sink: Sink, progress: Callable[[int], None] | None = None
) -> tuple[dict[str, Any], float]:
    """Simulate one point; the summary's figures, and the CPU seconds that the probe took of it."""
    model, device = make_hardware(experiment)
    capacity = make_capacity(experiment, model, device)
    scheduler = make_scheduler(experiment, make_allocator(experiment, capacity))
    workload = make_workload(experiment, capacity, replication)
    step_time = make_timing(experiment, model, device)
    tiers = make_tiers(experiment, model, device, scheduler.allocator)
    if tiers is not None:
        scheduler.allocator.open_tiers(tiers)
    probe = make_probe(experiment, workload.num_requests, model, step_time)
    figures = _simulate(
        probe,
        workload,
        scheduler=scheduler,
        timing=step_time,
        transfers=make_transfers(experiment, model, device, scheduler.allocator),
        recorder=Recorder(sink, **experiment.record),
        max_model_len=capacity.max_model_len,
        progress=progress,
    )
    figures |= further_figures(figures, scheduler.allocator, model, step_time, workload.content_grain)
    if probe is None:
        return {**figures, "probe_steps": 0, "probe_max_error": None}, 0.0
    return {**figures, **probe.figures}, probe.cpu_s


def _simulate(probe: AttentionProbe | None, *arguments: Any, **options: Any) -> dict[str, Any]:
    """A simulation with a probe, whose errors carry the memory as it was found."""
    try:
        return simulate(*arguments, **options, probe=probe)
    except ProbeError as error:
        if probe is not None:
            error.evidence = probe.audit.ledger.evidence()
        raise


def capacity_told(experiment: Experiment) -> dict[str, Any]:
    """What the KV memory of a point comes to, for its manifest."""
    model, device = make_hardware(experiment)
    capacity = make_capacity(experiment, model, device)
    return {
        "num_slots": make_allocator(experiment, capacity).num_slots,
        "max_model_len": capacity.max_model_len,
        "kv_bytes_per_token": model.kv_bytes_per_token if model is not None else None,
    }


def make_hardware(experiment: Experiment) -> tuple[Model | None, Device | None]:
    """The model with the precision of its cache, and the device with as many others as serve it."""
    model = _row(hardware.model, experiment.model)
    if model is not None:
        model = replace(
            model, kv_cache_dtype=experiment.kv_cache_dtype, tensor_parallel=experiment.tensor_parallel
        )
    device = _row(hardware.device, experiment.device)
    if device is not None:
        device = replace(device, count=experiment.tensor_parallel)
    return model, device


def _row(registry: Registry[Any], settings: Mapping[str, Any] | None) -> Any:
    if settings is None:
        return None
    return registry[settings["kind"]](**{key: value for key, value in settings.items() if key != "kind"})


def make_allocator(experiment: Experiment, capacity: Capacity) -> Allocator:
    """The allocator over its slots. Raises Mistakes if it has no place for what the model's layers keep."""
    kind = experiment.allocator["kind"]
    if not issubclass(allocator[kind], Allocator):
        raise wrong("a plug-in's class is none", "allocator", kind, "a class that comes from sim.Allocator")
    if any(each.state_bytes for each in capacity.layers) and not allocator[kind].groups_layers:
        able = " or ".join(name for name in allocator.kinds if allocator[name].groups_layers)
        raise wrong("no place for the states of the model's layers", "allocator", kind, f"{able}")
    made: Allocator = make(allocator, experiment.allocator, ("allocator",), capacity)
    return made


def make_scheduler(experiment: Experiment, over: Allocator) -> Scheduler:
    """The scheduler over its allocator."""
    kind = experiment.scheduler["kind"]
    if not issubclass(scheduler[kind], Scheduler):
        raise wrong("a plug-in's class is none", "scheduler", kind, "a class that comes from sim.Scheduler")
    made: Scheduler = make(scheduler, experiment.scheduler, ("scheduler",), over)
    return made


def make_workload(experiment: Experiment, capacity: Capacity, replication: int) -> Any:
    """The workload; its random streams depend on nothing but seed and replication."""
    streams = Streams(experiment.seed, replication)
    return make(workload, experiment.workload, ("workload",), streams, capacity.max_model_len)


def make_timing(experiment: Experiment, model: Model | None, device: Device | None) -> StepTime:
    """The timing model."""
    settings = experiment.timing
    if settings.get("block_size", 0) is None:
        settings = {**settings, "block_size": experiment.allocator.get("block_size", BLOCK_SIZE)}
    made: StepTime = make(timing, settings, ("timing",), model, device)
    return made


def make_transfers(
    experiment: Experiment, model: Model | None, device: Device | None, over: Allocator
) -> Transfers:
    """The cost of moving blocks."""
    made: Transfers = construct(
        Transfers, experiment.transfers, ("transfers",), model, device, over.block_size
    )
    return made


def make_tiers(
    experiment: Experiment, model: Model | None, device: Device | None, over: Allocator
) -> TieredStore | None:
    """The tiers behind the device; None without any. Raises Mistakes if the allocator caches nothing for them."""
    if experiment.tiers is None:
        return None
    if not (over.can_offload and over.keeps_freed):
        states = any(each.state_bytes for each in getattr(model, "layer_kinds", ()))
        without = "no checkpoints of states are kept" if states else "it finds no prefixes (prefix_caching)"
        why = over.reasons.get("can_offload", without)
        raise wrong(
            f"there are no cached prefixes that tiers could go on with: {why}",
            "tiers",
            str(experiment.allocator["kind"]),
            f"one that does: {those('can_offload')}, with prefix caching",
        )
    block_bytes = over.offloaded_bytes(model.kv_bytes_per_token) if model is not None else 0
    tiers = [
        make(tier, settings, ("tiers", index), block_bytes, device)
        for index, settings in enumerate(experiment.tiers)
    ]
    made: TieredStore = construct(TieredStore, experiment.offload, ("tiers",), tiers)
    return made


def those(power: str) -> str:
    """The allocators that can do something, with prefix caching or without."""
    made = {
        kind: [allocator[kind].made({"prefix_caching": caching}) for caching in (False, True)]
        for kind in allocator
    }
    return ", ".join(kind for kind, either in made.items() if any(getattr(each, power) for each in either))


def make_probe(
    experiment: Experiment, num_requests: int | None, model: Model | None, step_time: StepTime | None
) -> AttentionProbe | None:
    """The probe of a run of so many requests; None where the experiment wants none."""
    settings = experiment.probe
    if settings is False:
        return None
    fields = {} if settings is True else settings
    made: AttentionProbe = construct(AttentionProbe, fields, ("probe",), num_requests, model, step_time)
    return made


def make(registry: Registry[Any], settings: Mapping[str, Any], path: Path, *engine: Any) -> Any:
    """The policy that settings describe, given what the engine hands it."""
    return construct(registry[settings["kind"]], settings, path, *engine)


def construct(policy: Callable[..., Any], settings: Mapping[str, Any], path: Path, *engine: Any) -> Any:
    """A class with its fields, or a function with its fields bound. Raises Mistakes if it refuses them."""
    fields = {
        field.name: _value(field.annotation, settings[field.name], (*path, field.name))
        for field in fields_of(policy)
        if field.name in settings
    }
    if not inspect.isclass(policy):
        return functools.partial(policy, **fields) if fields else policy
    try:
        return policy(*engine, **fields)
    except Mistakes:
        raise
    except UserError as error:
        raise Mistakes([Mistake(str(error), path)]) from error
    except MemoryError as error:
        what = f"{policy.__name__} has more blocks than this machine has memory to keep books of"
        raise Mistakes([Mistake(what, path)]) from error
    except Exception as error:
        what = f"{policy.__name__} raises {type(error).__name__}: {error}"
        raise Mistakes([Mistake(what, path)]) from error


def read_profile(file: File, section: type[Any]) -> Any:
    """The section that a file holds. Raises Mistakes with everything that is wrong in it, and where."""
    from experiments import document  # most runs need neither YAML nor the schema
    from experiments.schema import Schema
    from experiments.sections import Section

    root, mistakes = document.read(file)
    settings, wrong = Schema(Section(section)).resolve(root.plain())
    try:
        if mistakes or wrong:
            raise Mistakes([*mistakes, *wrong])
        return construct(section, settings, ())
    except Mistakes as error:
        raise Mistakes(
            [mistake.placed(root.position(mistake.path, mistake.on_key)) for mistake in error.mistakes]
        ) from None


def _value(annotation: Any, value: Any, path: Path) -> Any:
    for base, marks in alternatives(annotation):
        if isinstance(value, str) and base is File:
            return File(value)
        if isinstance(value, str) and file_in(base, marks) is not None:
            return read_profile(File(value), base)
        if isinstance(value, dict):
            registry, section = registry_in(base, marks), section_in(base, marks)
            if registry is not None:
                return make(registry, value, path)
            if section is not None:
                return construct(section, value, path)
    return value
