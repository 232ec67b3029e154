"""Words on figures: short labels for policies, names and units for swept axes, readable numbers."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.text import tier_told

Config = Mapping[str, Any]

#: Sections whose values never tell one policy from another.
_SILENT = {"name", "seed", "replication", "replications", "sweep", "record", "probe", "plugins"}
#: Fields that say most about a policy: they come first, and always stand beside their kind.
_TELLING = ("kind", "name", "reserve", "block_size", "largest_block")

_AXES = {
    "workload.arrivals.rate": ("Request rate", "requests/s"),
    "workload.rate": ("Request rate", "requests/s"),
    "workload.arrivals.session_rate": ("Session rate", "sessions/s"),
    "workload.arrivals.clients": ("Clients", ""),
    "workload.sampling.n": ("Samples per request", ""),
    "workload.sampling.beam_width": ("Beam width", ""),
    "workload.few_shot.examples": ("Examples", ""),
    "workload.system_prompts.count": ("System prompts", ""),
    "workload.system_prompts.zipf": ("Zipf exponent", ""),
    "workload.session.turns": ("Turns", ""),
    "allocator.block_size": ("Block size", "slots"),
    "allocator.watermark": ("Watermark", "share of blocks"),
    "allocator.num_host_blocks": ("Host memory", "blocks"),
    "scheduler.max_num_seqs": ("Batch limit", "sequences"),
    "scheduler.max_num_batched_tokens": ("Token limit of a step", "tokens"),
    "num_blocks": ("KV memory", "blocks"),
    "kv_memory": ("KV memory", "GiB"),
    "memory_utilization": ("Memory utilisation", "share"),
    "max_model_len": ("Longest sequence", "tokens"),
    "tensor_parallel": ("Devices in tensor parallel", ""),
}
_UNITS = {"ms": "ms", "us": "µs", "s": "s", "tokens": "tokens", "bytes": "B", "per_s": "1/s"}


def axis_name(path: str) -> tuple[str, str]:
    """Name and unit of a swept number, `("Step overhead", "ms")`; the unit is empty where there is none.

    >>> axis_name("timing.step_overhead_ms")
    ('Step overhead', 'ms')
    """
    if path in _AXES:
        return _AXES[path]
    words = path.rsplit(".", 1)[-1].split("_")
    unit = _UNITS.get(words[-1], "") if len(words) > 1 else ""
    return " ".join(words[:-1] if unit else words).capitalize(), unit


def axis_label(path: str) -> str:
    """Label of an axis, `Request rate (requests/s)`."""
    name, unit = axis_name(path)
    return f"{name} ({unit})" if unit else name


def setting(path: str, value: float) -> str:
    """One value of an axis in words.

    >>> setting("workload.arrivals.rate", 2), setting("num_blocks", 500), setting("allocator.block_size", 16)
    ('2 requests/s', 'KV memory 500 blocks', 'block size 16')
    """
    name, unit = axis_name(path)
    if unit == "GiB" and value >= 2**20:  # a size is in bytes
        value /= 2**30
    if unit in ("requests/s", "GiB"):
        return f"{number(value)} {unit.replace('requests', 'request') if value == 1 else unit}"
    return f"{lowered(name)} {number(value)} {unit if unit != 'slots' else ''}".rstrip()


_SWITCHES = ("layer_wise", "prefetch")
"""Fields of which it is told who has them, not who has them not."""
LETTER = 0.068
"""Inches that a letter of a label takes in print."""


def wrapped(label: str, room: float) -> str:
    """A label on lines no wider than `room` inches in print, broken at commas first."""
    letters = max(int(room / LETTER), 6)
    if len(label) <= letters:
        return label
    return "\n".join(textwrap.fill(part, letters, break_long_words=False) for part in label.split(", "))


def lowered(name: str) -> str:
    """A name as it stands inside a sentence: abbreviations keep their capitals."""
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def listed(words: Sequence[str]) -> str:
    """Words as an English list, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def number(value: float | None, digits: int = 3, *, zeros: bool = False) -> str:
    """A number for reading: `digits` significant digits, all digits before the point, thousands by commas.

    Zeros at the end stay if asked for, so that numbers below each other look alike.

    >>> number(15728.0), number(0.03456), number(2.0), number(2.0, zeros=True), number(None)
    ('15,728', '0.0346', '2', '2.00', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    text = f"{value:,.{max(digits - 1 - magnitude, 0)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text and not zeros else text
    return text.replace("-", "−")


def flattened(config: Config, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested mapping under their dotted paths."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flattened(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def policy_labels(configs: Sequence[Config], axes: Iterable[str] = ()) -> list[str]:
    """A short label for each configuration, made from the fields in which they differ.

    Fields are tried in order of how much they say; each is used only to tell apart what is still alike.

    >>> contiguous = {"kind": "contiguous", "reserve": "max", "placement": "buddy"}
    >>> oracle, paged = contiguous | {"reserve": "oracle"}, {"kind": "paged", "block_size": 16}
    >>> policy_labels([{"allocator": allocator} for allocator in (contiguous, oracle, paged)])
    ['contiguous max', 'contiguous oracle', 'paged 16']
    """
    hidden = set(axes)
    leaves = [
        {
            path: value
            for path, value in flattened(config).items()
            if path.split(".")[0] not in _SILENT and path not in hidden
        }
        for config in configs
    ]
    paths = sorted({path for leaf in leaves for path in leaf}, key=_rank)
    words: list[dict[str, list[str]]] = [{} for _ in leaves]
    _tell_apart(list(range(len(leaves))), paths, leaves, words)
    labels = [", ".join(" ".join(section) for section in word.values()) for word in words]
    return [label or _plain(leaf, hidden) for label, leaf in zip(labels, leaves, strict=True)]


def _rank(path: str) -> tuple[int, int, int, str]:
    section, field = path.split(".")[0], path.rsplit(".", 1)[-1]
    first = {"allocator": 0, "scheduler": 1}.get(section, 2)
    return first, path.count("."), _TELLING.index(field) if field in _TELLING else len(_TELLING), path


def _tell_apart(
    group: list[int], paths: list[str], leaves: list[dict[str, Any]], words: list[dict[str, list[str]]]
) -> None:
    """Give the members of a group words by the first path in which they differ; go on within each part."""
    if len(group) < 2:
        return
    for path in paths:
        parts: dict[str, list[int]] = {}
        for member in group:
            parts.setdefault(repr(leaves[member].get(path)), []).append(member)
        if len(parts) > 1:
            for part in parts.values():
                for member in part:
                    _say(path, leaves[member], words[member])
                _tell_apart(part, paths, leaves, words)
            return


def _say(path: str, leaf: dict[str, Any], words: dict[str, list[str]]) -> None:
    """Put one field into a label, after the kind that it belongs to and what always stands beside it."""
    section, _, field = path.rpartition(".")
    said = words.setdefault(section, [])
    if not said and section:
        said += [str(leaf[f"{section}.kind"])] if f"{section}.kind" in leaf else []
        said += [_word(f, leaf[f"{section}.{f}"]) for f in _TELLING[2:] if f"{section}.{f}" in leaf]
    if (path in leaf and field not in _TELLING) or not said:
        if leaf.get(path) is False and field in _SWITCHES and said:
            return  # the others say that they have it
        said.append(_word(field, leaf.get(path)))


def _word(field: str, value: Any) -> str:
    if field == "prefix_caching":
        value = value is not False  # by default
    if field == "asynchronous":
        return "asynchronous" if value else "synchronous"
    if isinstance(value, bool):
        return field.replace("_", " ") if value else f"no {field.replace('_', ' ')}"
    if field == "kv_cache_dtype":
        return str(value or "full")
    if value is None:
        return f"no {field.replace('_', ' ')}"
    if field == "largest_block":  # behind the smallest
        return f"to {number(value)}"
    if field == "tiers":
        return " + ".join(tier_told(tier) for tier in value)
    if field == "path":
        return str(value).rsplit("/", 1)[-1]
    if isinstance(value, int | float):
        text = number(value)
        name, unit = axis_name(field)
        return text if field in _TELLING else f"{lowered(name)} {text} {unit}".rstrip()
    return str(value)


def _plain(leaf: dict[str, Any], axes: set[str]) -> str:
    """The label of a policy that is alone."""
    words: dict[str, list[str]] = {}
    if "allocator.kind" in leaf:
        _say("allocator.kind", leaf, words)
    return " ".join(words.get("allocator", ["all runs"]))
