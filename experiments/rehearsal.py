"""The rehearsal: everything that a point builds is built once before anything runs, to hear what refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from attention.probe import AttentionProbe
from experiments import build
from experiments.build import those
from experiments.capacity import make_capacity
from experiments.document import Node
from experiments.experiment import Experiment
from experiments.mistakes import Mistake, Mistakes, Path
from sim.allocators import Allocator, allocator
from sim.registry import Registry
from sim.request import one_priority
from sim.schedulers import scheduler
from sim.tiers.tiered_store import TieredStore
from sim.timing import Transfers, timing
from workloads.workload import workload

SWAPPING = ("copy_latency_us", "copies_per_block", "host_bandwidth_gb_per_s", "quantization", "asynchronous")
"""Fields of `transfers` that say how blocks are swapped."""


class Rehearsal:
    """Builds points without running them; what several points have in common is built once."""

    def __init__(self) -> None:
        self._built: dict[str, tuple[Any, list[Mistake]]] = {}

    def mistakes(
        self, settings: dict[str, Any], written: Node, without: Callable[[Path], Any], known: list[Path]
    ) -> list[Mistake]:
        """What is wrong with a point whose values are of the right form, beside what is known to be.

        An option that has no meaning beside the others is a mistake if the user wrote it (it stands in the
        document `written`) and it is not what it would be `without` that: settings in which all defaults are
        written out mean the same as those they come from.
        """
        found = self._refusals(Experiment(**settings))
        found += [
            mistake
            for mistake in _contradictions(settings)
            if written.get(*mistake.path) and at(settings, mistake.path) != without(mistake.path)
        ]
        told: dict[Path, Mistake] = {}
        for (
            mistake
        ) in found:  # not those of a section in which something is wrong anyway, and one for each field
            if not any(mistake.path == path[: len(mistake.path)] for path in known):
                told.setdefault(mistake.path, mistake)
        return list(told.values())

    def _refusals(self, experiment: Experiment) -> list[Mistake]:
        found: list[Mistake] = []

        def attempt(make: Callable[..., Any], *needs: Any, key: Any) -> Any:
            made, mistakes = self._attempt(make, experiment, needs, key)
            found.extend(mistakes)
            return made

        memory = [
            experiment.model, experiment.device, experiment.tensor_parallel, experiment.num_blocks,
            experiment.kv_memory, experiment.memory_utilization, experiment.max_model_len,
            experiment.allocator, experiment.kv_cache_dtype,
        ]  # fmt: skip
        model, device = build.make_hardware(experiment)
        capacity = attempt(make_capacity, model, device, key=memory)
        if capacity is not None:
            owner = attempt(build.make_allocator, capacity, key=memory)
            attempt(build.make_workload, capacity, 0, key=[experiment.workload, capacity.max_model_len])
            if owner is not None:
                attempt(build.make_scheduler, owner, key=[memory, experiment.scheduler])
                attempt(build.make_transfers, model, device, owner, key=[memory, experiment.transfers])
                offloading = [memory, experiment.tiers, experiment.offload]
                attempt(build.make_tiers, model, device, owner, key=offloading)
        attempt(
            build.make_timing, model, device, key=[memory[:3], experiment.kv_cache_dtype, experiment.timing]
        )
        attempt(build.make_probe, None, model, None, key=[memory[0], experiment.probe])
        return found

    def _attempt(
        self, make: Callable[..., Any], experiment: Experiment, needs: tuple[Any, ...], key: Any
    ) -> tuple[Any, list[Mistake]]:
        name = make.__name__ + json.dumps(key)
        if name not in self._built:
            try:
                self._built[name] = make(experiment, *needs), []
            except Mistakes as error:
                self._built[name] = None, error.mistakes
        return self._built[name]


def read_traces(settings: Iterable[dict[str, Any]]) -> int:
    """Read every row of the traces that points are served, each once; the rows. Raises UserError at the first wrong."""
    rows: dict[str, int] = {}
    for each in settings:
        experiment = Experiment(**each)
        if experiment.workload["kind"] == "trace":
            capacity = make_capacity(experiment, *build.make_hardware(experiment))
            key = json.dumps([experiment.workload, capacity.max_model_len], default=str)
            if key not in rows:
                rows[key] = sum(1 for _ in build.make_workload(experiment, capacity, 0).requests())
    return sum(rows.values())


def at(settings: Any, path: Path) -> Any:
    """The value at a path."""
    for part in path:
        settings = settings[part]
    return settings


def _contradictions(settings: dict[str, Any]) -> Iterator[Mistake]:
    """Combinations that the policies themselves, or what they can do, rule out."""
    registries: dict[str, Registry[Any]] = {
        "allocator": allocator, "scheduler": scheduler, "timing": timing, "workload": workload
    }  # fmt: skip
    for section, registry in registries.items():
        policy = registry[settings[section]["kind"]]
        try:
            complaints = list(policy.check(settings)) if hasattr(policy, "check") else []
        except Exception as error:
            complaints = [(section, f"{policy.__name__}.check raises {type(error).__name__}: {error}")]
        for field, complaint in complaints:
            yield Mistake(complaint, tuple(field.split(".")))
    for field, complaint in [
        *Transfers.check(settings),
        *TieredStore.check(settings),
        *AttentionProbe.check(settings),
    ]:
        yield Mistake(complaint, tuple(field.split(".")))
    for index, each in enumerate(settings.get("tiers") or ()):
        if each.get("num_blocks") is not None:
            yield Mistake("num_blocks says how much the tier keeps", ("tiers", index, "capacity_gb"))
        if each.get("eviction") == {"kind": "priority"} and one_priority(settings["workload"]):
            what = "all requests have the same priority: set workload.priorities"
            yield Mistake(what, ("tiers", index, "eviction"))
    name = settings["allocator"]["kind"]
    if not issubclass(allocator[name], Allocator):
        return
    owner = allocator[name].made(settings["allocator"])
    sampling = settings["workload"].get("sampling") or {}
    for field in ("n", "best_of", "beam_width"):
        if (sampling.get(field) or 1) > 1 and not owner.can_fork:
            expected = f"1, or an allocator that shares slots ({those('can_fork')})"
            what = _cannot(owner, name, "can_fork", "fork")
            yield Mistake(what, ("workload", "sampling", field), str(sampling[field]), expected)
    for field, how, without in (
        ("asynchronous", "beside the computation", "false"),
        ("quantization", "at another precision", "null"),
    ):
        value = (settings.get("transfers") or {}).get(field)
        if field == "asynchronous" and settings.get("tiers") is not None:
            continue  # so are those from and to tiers
        if value and not owner.can_fly:
            expected = f"{without}, or an allocator that does ({those('can_fly')})"
            what = _cannot(owner, name, "can_swap", f"swap {how}")
            yield Mistake(what, ("transfers", field), str(value).lower(), expected)
    if not _swaps(owner, settings):
        idle = ["allocator.num_host_blocks"] if settings["allocator"].get("num_host_blocks") else []
        idle += [f"transfers.{field}" for field in SWAPPING if field in (settings.get("transfers") or {})]
        if settings.get("tiers") is not None:  # loads and stores may go on beside the computation too
            idle = [path for path in idle if path != "transfers.asynchronous"]
        for path in idle:
            yield Mistake("has no meaning here: nothing is ever swapped", tuple(path.split(".")))
    if not owner.can_grow:
        for field in ("preemption", "victim"):
            if field in settings["scheduler"]:
                what = f"has no meaning with allocator {name}: nobody outgrows a reservation"
                yield Mistake(what, ("scheduler", field))
        return
    for modes, power, what, others in (
        (("swap", "hybrid"), "can_swap", "swap", "that swaps"),
        (("partial",), "can_stop", "take a part of what a sequence holds", "that does"),
    ):
        mode = settings["scheduler"].get("preemption")
        if mode in modes and not getattr(owner, power, True):
            expected = f"recompute, or an allocator {others} ({those(power)})"
            yield Mistake(
                _cannot(owner, name, power, what), ("scheduler", "preemption"), f"'{mode}'", expected
            )


def _cannot(owner: type[Allocator], name: str, power: str, what: str) -> str:
    """What an allocator cannot do, and why if it says so."""
    why = owner.reasons.get(power)
    with_caching = " with prefix_caching" if owner is not allocator[name] else ""
    return f"allocator {name} cannot {what}{with_caching}" + (f": {why}" if why else "")


def _swaps(owner: type[Allocator], settings: dict[str, Any]) -> bool:
    """Whether anything may be swapped: by the mode of preemption, or since groups of branches are."""
    mode = settings["scheduler"].get("preemption", "auto")
    sampling = settings["workload"].get("sampling") or {}
    group = any((sampling.get(field) or 1) > 1 for field in ("n", "best_of", "beam_width"))
    return owner.can_swap and owner.can_grow and (mode in ("swap", "hybrid") or (group and mode == "auto"))
