"""What a recording of each format says: the fields of its header, of its requests and of its operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.errors import UserError

LARGEST = 1_000_000
"""No recording has more blocks, tokens or steps; what has is no recording, and would fill the memory."""


@dataclass(frozen=True)
class Value:
    """What a field may be."""

    expected: str
    fits: Callable[[Any], bool]
    needed: bool = True


Row = Mapping[str, Any]
Fields = Mapping[str, Value]


def _is_whole(value: Any, least: int, most: int = LARGEST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def whole(least: int, *, needed: bool = True) -> Value:
    """A number of things."""
    return Value(f"a whole number from {least} to {LARGEST:,}", lambda value: _is_whole(value, least), needed)


def _is_token(value: Any) -> bool:
    return _is_whole(value, -(1 << 63), (1 << 63) - 1)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= LARGEST and all(map(_is_token, value))


def _is_runs(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(run, list) and len(run) == 2 and _is_token(run[0]) and _is_whole(run[1], 1)
            for run in value
        )
        and sum(count for _, count in value) <= LARGEST
    )


def _is_appended(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_token, value.values()))


def _is_group(value: Any) -> bool:
    return value in ("full", None) or _is_whole(value, 1)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


TOKEN = Value("a token, a whole number of 64 bits", _is_token)
TOKENS = Value("a list of tokens, which are whole numbers of 64 bits", _is_tokens)
RUNS = Value("a list of runs [first token, number of tokens]", _is_runs)
NAME = Value("a name", lambda value: isinstance(value, str))
GROUP = Value("a name", lambda value: isinstance(value, str | int) and not isinstance(value, bool))
FLAG = Value("true or false", lambda value: isinstance(value, bool))
OPTIONAL_FLAG = Value(FLAG.expected, FLAG.fits, needed=False)
SHARE = Value("a share from 0 up to 1", _is_share, needed=False)
CHUNK = whole(1, needed=False)


@dataclass(frozen=True)
class Format:
    """One kind of recording, of a manager or, where it has `requests`, of a scheduler."""

    config: Fields
    operations: Mapping[str, Fields]
    requests: Fields = field(default_factory=dict)
    contradiction: Callable[[Row, list[Row]], str] = lambda config, requests: ""
    """What in a configuration and its requests, each right in itself, cannot be together; empty if nothing."""

    def check_header(self, path: Path, header: Mapping[str, Any]) -> None:
        """Raises UserError for a configuration, or a request, that no run can have had."""
        for complaint in _complaints("config", header["config"], self.config):
            raise UserError(f"{path}:1: {complaint}")
        for name, value in header["config"].items():
            if name not in self.config and value:  # what is off, or not there, changes nothing
                known = ", ".join(self.config)
                raise UserError(
                    f"{path}:1: config.{name}: got {value!r}, which is not replayed; known are {known}"
                )
        if self.requests:
            self._check_requests(path, header["requests"])
        complaint = self.contradiction(header["config"], header.get("requests", []))
        if complaint:
            raise UserError(f"{path}:1: {complaint}")

    def _check_requests(self, path: Path, requests: Any) -> None:
        if not isinstance(requests, list):
            raise UserError(f"{path}:1: requests: got {requests!r}, expected a list")
        known = set()
        for number, row in enumerate(requests):
            where = f"requests[{number}]"
            if not isinstance(row, dict):
                raise UserError(f"{path}:1: {where}: got {row!r}, expected an object")
            for complaint in _complaints(where, row, self.requests):
                raise UserError(f"{path}:1: {complaint}")
            if row["id"] in known:
                raise UserError(f"{path}:1: {where}.id: got {row['id']!r} a second time")
            known.add(row["id"])

    def check_operation(self, path: Path, line: int, op: Mapping[str, Any]) -> None:
        """Raises UserError for an operation that the format does not have."""
        fields: Fields
        name: Any = "step" if self.requests else op.get("op")
        if self.requests:
            fields = self.operations["step"]
        else:
            if not isinstance(name, str) or name not in self.operations:
                known = ", ".join(self.operations)
                raise UserError(
                    f"{path}:{line}: got the operation {name!r}, which is not of this format; expected one of {known}"
                )
            fields = {"op": NAME, **self.operations[name]}
        for complaint in _complaints("op", op, fields):
            raise UserError(f"{path}:{line}: {complaint}")
        for unknown in op.keys() - fields.keys():
            known = ", ".join(fields)
            raise UserError(f"{path}:{line}: op.{unknown}: {name} has no such field; expected {known}")


def _complaints(where: str, row: Mapping[str, Any], fields: Fields) -> Iterator[str]:
    for name, value in fields.items():
        if name not in row:
            if value.needed:
                yield f"{where}: lacks {name}, expected {value.expected}"
        elif not value.fits(row[name]) and (value.needed or row[name] is not None):  # null is not given
            yield f"{where}.{name}: got {row[name]!r}, expected {value.expected}"


# vLLM V0

_V0_POOLS = {
    "block_size": whole(1), "num_gpu_blocks": whole(1), "num_cpu_blocks": whole(0), "watermark_blocks": whole(0),
    "watermark": SHARE, "prefix_caching": OPTIONAL_FLAG,
}  # fmt: skip


def _v0_manager(config: Row, requests: list[Row]) -> str:
    blocks, kept = config["num_gpu_blocks"], config["watermark_blocks"]
    share = config.get("watermark")
    if kept >= blocks:
        return f"config.watermark_blocks: {kept} leave nothing of {blocks} blocks"
    if share is not None and int(share * blocks) != kept:
        return (
            f"config.watermark_blocks: got {kept}, and {share} of {blocks} blocks are {int(share * blocks)}"
        )
    return ""


def _v0_scheduler(config: Row, requests: list[Row]) -> str:
    limit = config["max_model_len"]
    if not config["chunked_prefill"]:
        limit = min(limit, config["max_num_batched_tokens"])
    if config["prompt_limit"] != limit:
        return f"config.prompt_limit: got {config['prompt_limit']}, expected {limit} by the other fields"
    for row in requests:
        samples = row.get("n") or 1
        if len(row["out_lens"]) != samples:
            return f"request {row['id']}: got {len(row['out_lens'])} out_lens, expected one for each of {samples}"
    return _v0_manager(config, requests)


V0_MANAGER = Format(
    _V0_POOLS,
    {
        "alloc": {"g": GROUP, "s": whole(0), "tokens": TOKENS},
        "fork": {"g": GROUP, "parent": whole(0), "child": whole(0)},
        "append": {"g": GROUP, "tokens": Value("a token for each sequence", _is_appended)},
        "finish": {"g": GROUP, "s": whole(0)},
        "swap_out": {"g": GROUP},
        "swap_in": {"g": GROUP},
    },
    contradiction=_v0_manager,
)
_LIMITS = {"max_num_seqs": whole(1), "max_num_batched_tokens": whole(1)}
_STEPS = {"step": {"step": whole(0)}}
V0_SCHEDULER = Format(
    {**_V0_POOLS, **_LIMITS, "max_model_len": whole(1), "chunked_prefill": FLAG, "prompt_limit": whole(1)},
    _STEPS,
    {
        "id": NAME, "arrival_step": whole(0), "prompt_len": whole(1), "beam": OPTIONAL_FLAG,
        "n": whole(1, needed=False), "out_lens": Value(
            "a list of numbers of tokens",
            lambda value: isinstance(value, list) and bool(value) and all(_is_whole(each, 1) for each in value),
        ),
    },
    _v0_scheduler,
)  # fmt: skip

# vLLM V1

_V1_BLOCKS = {
    "block_size": whole(1), "num_blocks_including_null": whole(2), "usable_blocks": whole(1), "prefix_caching": FLAG,
    "groups": Value(
        "a list with full, null or a window of at least 1 for each group of layers",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_group, value)), needed=False,
    ),
}  # fmt: skip
_ADMIT = {"r": NAME, "tokens": TOKENS, "chunk": CHUNK}


def _v1(config: Row, requests: list[Row]) -> str:
    usable, blocks = config["usable_blocks"], config["num_blocks_including_null"]
    if usable != blocks - 1:
        return f"config.usable_blocks: got {usable}, expected all of {blocks} but the null block"
    for row in requests:
        tokens = sum(count for _, count in row["prompt"])
        if tokens >= config["max_model_len"]:
            longest = config["max_model_len"]
            return f"request {row['id']}: {tokens} prompt tokens leave nothing of max_model_len {longest}"
    return ""


V1_MANAGER = Format(
    {**_V1_BLOCKS, "watermark_blocks": whole(0)},
    {
        "admit": _ADMIT,
        "continue_prefill": {"r": NAME, "chunk": whole(1)},
        "append": {"r": NAME, "token": TOKEN},
        "preempt": {"r": NAME},
        "resume": {"r": NAME, "chunk": CHUNK},
        "free": {"r": NAME},
        "probe": {"tokens": TOKENS},
        "reset_prefix_cache": {},
    },
    contradiction=_v1,
)
_TOKEN_REQUEST = {"id": NAME, "arrival_step": whole(0), "prompt": RUNS, "max_tokens": whole(1)}
V1_SCHEDULER = Format(
    {
        **_V1_BLOCKS, **_LIMITS, "max_model_len": whole(1), "long_prefill_token_threshold": whole(0),
        "chunked_prefill": FLAG, "policy": Value("fcfs or priority", lambda value: value in ("fcfs", "priority")),
        "reserve_full_isl": OPTIONAL_FLAG, "watermark": SHARE, "watermark_blocks": whole(0, needed=False),
    },
    _STEPS,
    {**_TOKEN_REQUEST, "priority": Value("a whole number", _is_token, needed=False)},
    _v1,
)  # fmt: skip

# nano-vllm and mini-sglang

NANO_MANAGER = Format(
    {"block_size": whole(1), "num_blocks": whole(1)},
    {
        "admit": {"r": NAME, "tokens": TOKENS},
        "resume": {"r": NAME},
        "append": {"r": NAME, "token": TOKEN},
        "free": {"r": NAME},
        "probe": {"tokens": TOKENS},
    },
)
NANO_SCHEDULER = Format(
    {"block_size": whole(1), "num_blocks": whole(1), **_LIMITS}, _STEPS, {**_TOKEN_REQUEST}
)
RADIX = Format(
    {"page_size": whole(1), "num_pages": whole(1)},
    {
        "admit": {"r": NAME, "tokens": TOKENS, "out_len": whole(1)},
        "prefill_done": {"r": NAME, "token": TOKEN},
        "decode": {"r": NAME, "token": TOKEN},
        "finish": {"r": NAME},
        "probe": {"tokens": TOKENS},
    },
)
