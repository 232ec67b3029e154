"""`kvsim fit` and `kvsim compare`: a simulated server beside a measured one, and what brings the two together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from experiments import build
from experiments.capacity import BLOCK_SIZE, make_capacity
from experiments.config import Plan, load
from experiments.experiment import Experiment
from experiments.least_squares import Floats, least_squares, spread
from experiments.measured import RequestTimes, comparison, read_measured
from sim.errors import UserError
from sim.recorder import Columns, Recorder
from sim.simulation import simulate

PARAMETERS = {
    # where it is likely, step of the search, least, most
    "compute_efficiency": (0.2, 0.9, 0.02, 0.02, 1.0),
    "memory_efficiency": (0.4, 1.0, 0.02, 0.02, 1.0),
    "step_overhead_ms": (0.0, 15.0, 0.5, 0.0, 100.0),
}
"""What is fitted of the roofline; efficiencies are shares of the device's figures."""

STARTS = 48
"""Points that are looked at before the best of them are followed."""

BLOCKS = "num_blocks"
SLACK_S = 1.0
"""How far an arrival that was measured may be from the workload's."""


def run_compare(config: Path, sets: Sequence[str], measured: Path) -> None:
    """Print predicted against measured for an experiment as it is."""
    experiment, _ = _experiment(config, sets)
    run = Servings(experiment, measured)
    print(comparison(_title(experiment, measured), run.measured, run.predicted(experiment)), end="")


def run_fit(config: Path, sets: Sequence[str], measured: Path, out: Path | None, *, blocks: bool) -> None:
    """Fit the roofline to a run, print what it comes to, and write the experiment with it."""
    experiment, plan = _experiment(config, sets)
    if experiment.timing["kind"] != "roofline":
        raise UserError(f"{config}: timing.kind: got {experiment.timing['kind']!r}, expected roofline")
    if out is not None and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        raise UserError(f"--out: {out} cannot be written")
    run = Servings(experiment, measured)
    fitted = fit(run, experiment, blocks=blocks)
    found = _with(experiment, fitted)
    print(comparison(_title(experiment, measured), run.measured, run.predicted(found)))
    for name, value in fitted.items():
        note = "  stands at its bound: the device's figure is too low, or something else takes the time"
        least, most = PARAMETERS.get(name, (0, 0, 0, 0, 0))[3:]
        print(f"{name}: {value:g}{note if value in (least, most) and value else ''}")
    if out is not None:
        out.write_text(_written(plan, fitted, measured), encoding="utf-8")
        print(f"fitted experiment: {out}")


class Servings:
    """The requests of a measured run, and how an experiment would serve them."""

    def __init__(self, experiment: Experiment, path: Path) -> None:
        self.measured, lines = read_measured(path)
        asked = self.predicted(experiment)
        theirs = self.measured
        if len(asked.arrival) != len(theirs.arrival):
            raise UserError(
                f"{path}: got {len(theirs.arrival)} requests, expected the {len(asked.arrival)} of the workload"
            )
        for name, member in (("prompt_tokens", "input_toks"), ("output_tokens", "output_toks")):
            got, expected = getattr(theirs, name), getattr(asked, name)
            for row in np.flatnonzero(got != expected)[:1]:
                raise UserError(
                    f"{path}:{lines[row]}: {member}: got {got[row]}, request {row} of the workload has {expected[row]}"
                )
        for row in np.flatnonzero(np.abs(theirs.arrival - asked.arrival) > SLACK_S)[:1]:
            raise UserError(
                f"{path}:{lines[row]}: arrival_time: got {theirs.arrival[row]:.3f} s after the first, "
                f"request {row} of the workload comes after {asked.arrival[row]:.3f} s"
            )

    def predicted(self, experiment: Experiment) -> RequestTimes:
        """Times of the experiment's requests. Raises UserError if one is refused."""
        tables: list[Columns] = []
        model, device = build.make_hardware(experiment)
        capacity = make_capacity(experiment, model, device)
        policy = build.make_scheduler(experiment, build.make_allocator(experiment, capacity))
        simulate(
            build.make_workload(experiment, capacity, 0),
            scheduler=policy,
            timing=build.make_timing(experiment, model, device),
            transfers=build.make_transfers(experiment, model, device, policy.allocator),
            recorder=Recorder(lambda _, columns: tables.append(columns), steps=False, memory=False),
            max_model_len=capacity.max_model_len,
        )
        column = {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}
        order = np.argsort(column["request_id"])
        column = {name: values[order] for name, values in column.items()}
        for row in np.flatnonzero(column["status"] != "finished")[:1]:
            raise UserError(f"the experiment refuses request {row}: {column['reason'][row]}")
        start = column["arrival_time"][0]
        return RequestTimes(
            column["arrival_time"] - start,
            column["first_scheduled_time"] - start,
            column["first_token_time"] - start,
            column["finish_time"] - start,
            column["prompt_tokens"],
            column["output_tokens"],
        )

    def residuals(self, experiment: Experiment) -> Floats:
        """Errors of TTFT, E2E and TPOT of every request as shares of the mean, over the root of their number."""
        ours, theirs = self.predicted(experiment), self.measured
        pairs = (theirs.ttft, ours.ttft), (theirs.e2e, ours.e2e), (theirs.tpot, ours.tpot)
        return np.concatenate([(b - a) / a.mean() / np.sqrt(len(a)) for a, b in pairs if len(a)])


def fit(run: Servings, experiment: Experiment, *, blocks: bool = False) -> dict[str, float]:
    """The roofline's parameters under which the experiment serves as measured, and the blocks if wanted.

    Only times of single requests are looked at. The number of blocks, which servers seldom tell, is at most
    what the experiment's memory gives.
    """
    search = dict(PARAMETERS)
    if blocks:
        most = float(_blocks(experiment))
        search[BLOCKS] = (0.4 * most, most, 0.02 * most, 0.05 * most, most)
    first, last, steps, low, high = np.array(list(search.values())).T
    reading = _reading_ms(experiment)
    # The weights are read, and the overhead is paid, once a step: what both take is searched for, not the latter.
    starts = first + (last - first) * spread(STARTS, len(search))
    starts[:, 2] += reading / starts[:, 1]
    high[2] += reading / low[1]

    def named(point: Floats, digits: int = 12) -> dict[str, float]:
        values = point.tolist()
        values[2] = max(0.0, values[2] - reading / values[1])
        return {
            name: int(value) if name == BLOCKS else float(f"{value:.{digits}g}")
            for name, value in zip(search, values, strict=True)
        }

    none = np.full_like(run.residuals(experiment), np.inf)

    def residuals(point: Floats) -> Floats:
        try:
            return run.residuals(_with(experiment, named(point)))
        except UserError:  # too few blocks for a request
            return none

    def loss(point: Floats) -> float:
        return float(np.square(residuals(point)).sum())

    found = [least_squares(residuals, start, steps, low, high) for start in sorted(starts, key=loss)[:3]]
    return named(least_squares(residuals, min(found, key=loss), steps, low, high), digits=4)


def _reading_ms(experiment: Experiment) -> float:
    """Time in which the devices read the weights at their full bandwidth."""
    model, device = build.make_hardware(experiment)
    assert model is not None
    assert device is not None
    return 1e3 * model.weight_bytes / (device.memory_bytes_per_s * device.count)


def _blocks(experiment: Experiment) -> int:
    model, device = build.make_hardware(experiment)
    capacity = make_capacity(experiment, model, device)
    return capacity.num_slots // int(experiment.allocator.get("block_size", BLOCK_SIZE))


def _with(experiment: Experiment, fitted: dict[str, float]) -> Experiment:
    timing = {name: value for name, value in fitted.items() if name != BLOCKS}
    changed = replace(experiment, timing={**experiment.timing, **timing})
    return replace(changed, num_blocks=int(fitted[BLOCKS])) if BLOCKS in fitted else changed


def _experiment(config: Path, sets: Sequence[str]) -> tuple[Experiment, Plan]:
    plan = load(config, sets, probe=False)
    if len(plan.points) != 1:
        raise UserError(f"{config}: sweep: got {len(plan.points)} points, expected one experiment")
    return Experiment(**plan.points[0].settings), plan


def _title(experiment: Experiment, measured: Path) -> str:
    names = [(each or {}).get("name", "") for each in (experiment.model, experiment.device)]
    return f"{measured.name}: {names[0]} on {experiment.tensor_parallel} x {names[1]}"


def _written(plan: Plan, fitted: dict[str, float], measured: Path) -> str:
    """The experiment as it was written, with what was fitted."""
    from ruamel.yaml import YAML

    written: dict[str, Any] = {**plan.points[0].written, "name": plan.name}
    written.pop("probe", None)
    written["timing"] = {**written["timing"], **{name: fitted[name] for name in PARAMETERS}}
    if BLOCKS in fitted:
        written[BLOCKS] = fitted[BLOCKS]
    stream = StringIO()
    stream.write(f"# {plan.purpose or plan.name} Fitted to {measured.name} by kvsim fit.\n")
    yaml = YAML(pure=True)
    yaml.width = 110
    yaml.default_flow_style = None
    yaml.dump(written, stream)
    return stream.getvalue()
