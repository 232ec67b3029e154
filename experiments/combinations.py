"""What combines with what: techniques of saving KV memory against allocators, asked of those that refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations as pairs_of
from pathlib import Path

from experiments import document
from experiments.config import Point, experiment_schema, planned
from experiments.mistakes import Mistake, Mistakes, Position
from sim.allocators import allocator

BASE = """\
name: combinations
kv_memory: 32 MiB
model:
  {name: tiny, num_layers: 4, hidden_size: 4096, num_heads: 32, head_dim: 128, num_params: 1.0e+6, max_model_len: 192}
device: a100-40gb
workload:
  num_requests: 20
  arrivals: {kind: poisson, rate: 4000}
  lengths:
    {kind: lognormal, prompt_median: 20, prompt_sigma: 0.7, output_median: 40, output_sigma: 0.5,
     max_prompt: 40, max_output: 64}
  system_prompts: {count: 2, tokens_median: 32}
scheduler: {kind: vllm_v0}
timing: {kind: roofline}
"""
"""A model of 64 KiB a token, so that 512 slots are fought for by 20 requests that begin alike."""

SHIPPED = [kind for kind in allocator.kinds if allocator[kind].__module__.startswith("sim.")]
"""The allocators that come along; those of plug-ins are no rows."""

OWN = {"vattention": ["allocator.page_size=64 KiB"]}
"""Settings without which an allocator does not fit into so little memory."""

MEANINGLESS = "unknown key"


@dataclass(frozen=True, slots=True)
class Technique:
    """A way to save memory, as one asks for it in YAML.

    `sets` are settings over the base; `asks` finds them for an allocator's fields and kind where they differ.
    """

    name: str
    sets: Sequence[str] = ()
    asks: Callable[[str], Sequence[str]] | None = field(default=None)

    def settings(self, kind: str) -> list[str]:
        """What to set for an allocator of this kind."""
        return [*self.sets, *(self.asks(kind) if self.asks is not None else ())]


def _prefixes(kind: str) -> Sequence[str]:
    """Some find prefixes in any case, others are told to."""
    told = any(each.name == "prefix_caching" for each in allocator.fields(kind))
    return () if allocator[kind].keeps_freed and not told else ["allocator.prefix_caching=true"]


def _cached(kind: str) -> Sequence[str]:
    """Tiers go on with cached prefixes, where an allocator is told to have some."""
    told = any(each.name == "prefix_caching" for each in allocator.fields(kind))
    return _prefixes(kind) if told else ()


def _windows(kind: str) -> Sequence[str]:
    """Layer groups follow the model."""
    if not allocator[kind].groups_layers:
        return ["allocator.windows=[null, 32]"]
    return ["model.num_sliding_layers=2", "model.sliding_window=32"]


TECHNIQUES = [
    Technique("parallel samples", ["workload.sampling={n: 2}"]),
    Technique("beams", ["workload.sampling={beam_width: 2}"]),
    Technique("prefixes", asks=_prefixes),
    Technique("belady", ["allocator.eviction=belady"]),
    Technique("recompute", ["scheduler.preemption=recompute"]),
    Technique("swap", ["scheduler.preemption=swap"]),
    Technique("hybrid", ["scheduler.preemption=hybrid"]),
    Technique("partial", ["scheduler.preemption=partial"]),
    Technique("asynchronous swap", ["scheduler.preemption=swap", "transfers.asynchronous=true"]),
    Technique("quantised swap", ["scheduler.preemption=swap", "transfers.quantization=int8"]),
    Technique("quantised cache", ["kv_cache_dtype=int8"]),
    Technique("tiers", ["tiers=[{kind: host, num_blocks: 64}]"], _cached),
    Technique("windows", asks=_windows),
    Technique("states", ["model.num_state_layers=2", "model.state_values_per_layer=8192"]),
    Technique("chunked prefill", ["scheduler.chunked_prefill=true", "scheduler.max_num_batched_tokens=64"]),
]
"""In the order of the table; a new one is a line here."""


def settings(kind: str, *techniques: Technique) -> list[str] | None:
    """Settings over the base for an allocator and techniques; None if two of these want one field otherwise."""
    wanted: dict[str, str] = {}
    for each in techniques:
        for setting in each.settings(kind):
            path, _, value = setting.partition("=")
            if wanted.setdefault(path, value) != value:
                return None
    return [
        f"allocator.kind={kind}",
        *OWN.get(kind, ()),
        *(f"{path}={value}" for path, value in wanted.items()),
    ]


class Checks:
    """What is said of experiments when they are read."""

    def __init__(self) -> None:
        self._schema = experiment_schema()
        self._base, _ = document.parse(BASE, Position("base", 1, 1))

    def point(self, sets: Sequence[str]) -> Point:
        """The only point of an experiment. Raises Mistakes if it is refused."""
        (point,) = planned(Path("base"), self._base, [], sets, self._schema).points
        return point

    def refusal(self, kind: str, sets: Sequence[str]) -> str:
        """Why an experiment with these settings is refused; empty if it is not."""
        try:
            self.point(sets)
        except Mistakes as error:
            return _reason(kind, error.mistakes[0])
        return ""


def _reason(kind: str, mistake: Mistake) -> str:
    option = str(mistake.path[-1])
    if mistake.what.startswith(MEANINGLESS):
        return mistake.what.removeprefix(MEANINGLESS).removeprefix(": ") or f"has no `{option}`"
    what = mistake.what.replace(f"allocator {kind}", "it")
    return what if what.startswith("it ") else f"`{option}`: {what}"


def combinations() -> str:
    """Two tables in Markdown: allocators against techniques, and techniques against each other."""
    notes: dict[str, int] = {}
    checks = Checks()
    able = {
        technique.name: {kind: checks.refusal(kind, settings(kind, technique) or []) for kind in SHIPPED}
        for technique in TECHNIQUES
    }
    head = ["allocator", *(each.name for each in TECHNIQUES)]
    rows = [[f"`{kind}`", *(_cell(able[each.name][kind], notes) for each in TECHNIQUES)] for kind in SHIPPED]
    lines = _table([head, *rows])
    told = [f"{number}. {reason}" for reason, number in notes.items()]
    between: dict[str, int] = {}
    square = _between(checks, able, between)
    told_between = [f"{number}. {reason}" for reason, number in between.items()]
    return "\n".join([*lines, "", *told, "", *square, "", *told_between])


def _between(checks: Checks, able: dict[str, dict[str, str]], notes: dict[str, int]) -> list[str]:
    """Each two techniques: the allocators with both that refuse them together, with the reasons."""
    cells = {(a.name, b.name): _both(checks, a, b, able, notes) for a, b in pairs_of(TECHNIQUES, 2)}
    head = ["", *(each.name for each in TECHNIQUES[1:])]
    rows = [
        [row.name, *(cells.get((row.name, column.name), "") for column in TECHNIQUES[1:])]
        for row in TECHNIQUES[:-1]
    ]
    return _table([head, *rows])


def _both(
    checks: Checks, a: Technique, b: Technique, able: dict[str, dict[str, str]], notes: dict[str, int]
) -> str:
    """yes if all allocators that have both take both, else who does; or does not, and why."""
    kinds = [kind for kind in SHIPPED if not able[a.name][kind] and not able[b.name][kind]]
    wanted = {kind: settings(kind, a, b) for kind in kinds}
    if not kinds:
        return "nobody"
    if all(sets is None for sets in wanted.values()):
        return "either"
    reasons = {kind: checks.refusal(kind, sets or []) for kind, sets in wanted.items()}
    taken = [kind for kind, reason in reasons.items() if not reason]
    refused = "".join(sorted({_note(reason, notes) for reason in reasons.values() if reason}))
    return ("yes" if not refused else ", ".join(taken) or "—") + (f" {refused}" if refused else "")


def _cell(reason: str, notes: dict[str, int]) -> str:
    return f"— {_note(reason, notes)}" if reason else "yes"


def _note(reason: str, notes: dict[str, int]) -> str:
    """The mark of a footnote."""
    return f"[{notes.setdefault(reason, len(notes) + 1)}]"


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
