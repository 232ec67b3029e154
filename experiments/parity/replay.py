"""Parity: what real engines were recorded to answer, against the same operations on our own classes.

A recorded file is one scenario: a header with the configuration, then a line an operation with what the engine
returned (`out`) and what could be observed afterwards (`state`). Every field of both is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.mistakes import near_file
from experiments.parity.format import (
    NANO_MANAGER,
    NANO_SCHEDULER,
    RADIX,
    V0_MANAGER,
    V0_SCHEDULER,
    V1_MANAGER,
    V1_SCHEDULER,
    Format,
)  # fmt: skip
from experiments.parity.rows import Driver, Misuse, Row
from sim.errors import IntegrityError, UserError


class Difference(AssertionError):
    """The first place where our answer is not the recorded one."""


def _v0_manager(header: Row) -> Driver:
    from experiments.parity.v0_manager import CachedManagerDriver, ManagerDriver

    kind = CachedManagerDriver if header["config"].get("prefix_caching") else ManagerDriver
    return kind(header["config"])


def _v0_scheduler(header: Row) -> Driver:
    from experiments.parity.v0 import SchedulerDriver

    return SchedulerDriver(header["config"], header["requests"])


def _v1_manager(header: Row) -> Driver:
    from experiments.parity.v1 import ManagerDriver

    return ManagerDriver(header["config"], keyless_first=not _is_oldest(header))


def _v1_scheduler(header: Row) -> Driver:
    from experiments.parity.v1 import SchedulerDriver

    return SchedulerDriver(header["config"], header["requests"], oldest=_is_oldest(header))


def _is_oldest(header: Row) -> bool:
    return bool(header["version"].endswith("0.10.0"))


def _nano_manager(header: Row) -> Driver:
    from experiments.parity.nano import ManagerDriver

    return ManagerDriver(header["config"])


def _nano_scheduler(header: Row) -> Driver:
    from experiments.parity.nano import SchedulerDriver

    return SchedulerDriver(header["config"], header["requests"])


def _radix(header: Row) -> Driver:
    from experiments.parity.radix import CacheDriver

    return CacheDriver(header["config"])


Replayed = tuple[Format, Callable[[Row], Driver]]

PEERS: dict[str, tuple[tuple[str, ...], Replayed, Replayed | None]] = {
    "vllm-V0": (("0.4.2",), (V0_MANAGER, _v0_manager), (V0_SCHEDULER, _v0_scheduler)),
    "vllm-V1": (("main 2026-08-17", "0.10.0"), (V1_MANAGER, _v1_manager), (V1_SCHEDULER, _v1_scheduler)),
    "nano-vllm": (("main 2026-04-26",), (NANO_MANAGER, _nano_manager), (NANO_SCHEDULER, _nano_scheduler)),
    "mini-sglang": (("main 2026-03-13",), (RADIX, _radix), None),
}
"""First word of a recording's peer: the versions that are known, and who performs its manager's operations and
its scheduler's steps."""


_FAULTS = ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


def read(path: Path) -> tuple[Row, list[Row]]:
    """Header and operations of a recorded file. Raises UserError with the line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        near = near_file(path) if isinstance(error, FileNotFoundError) else None
        hint = f", did you mean {near!r}?" if near else ""
        raise UserError(f"{path}: cannot be read: {reason}{hint}") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    rows = [_row(path, number, line, last=number == len(lines)) for number, line in enumerate(lines, 1)]
    if not rows:
        raise UserError(f"{path}:1: got an empty file, expected the header of a recording")
    header, *operations = rows
    if header.get("kind") != "header" or not isinstance(header.get("config"), dict):
        raise UserError(f'{path}:1: got no header, expected an object with "kind": "header" and "config"')
    if not operations:
        raise UserError(f"{path}:1: truncated: got a header alone, expected operations behind it")
    for number, row in enumerate(operations, 2):
        for name in ("op", "out", "state"):
            if not isinstance(row.get(name), dict):
                raise UserError(f"{path}:{number}: got {row.get(name)!r} as {name}, expected an object")
        if row.get("i") != number - 2:
            raise UserError(f"{path}:{number}: got operation {row.get('i')}, expected {number - 2}")
    totals = header.get("totals")
    steps = totals.get("steps") if isinstance(totals, dict) else None
    if steps not in (None, len(operations)):
        what = f"got {len(operations)} operations, expected the {steps} of the header's totals"
        raise UserError(f"{path}:{len(rows)}: truncated: {what}")
    return header, operations


def _row(path: Path, number: int, line: str, last: bool) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "truncated: " if last else ""
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{path}:{number}: {what}got no JSON ({why}), expected an object") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: got {row!r}, expected an object")
    return row


def build(path: Path, header: Row) -> tuple[Format, Driver]:
    """What a recording may say, and our side of it. Raises UserError for one that is not known."""
    peer, version = str(header.get("peer")), str(header.get("version")).removeprefix("v")
    word = peer.split(" ")[0]
    if word not in PEERS:
        raise UserError(f"{path}:1: got a recording of {peer!r}, expected one of {', '.join(PEERS)}")
    versions, manager, scheduler = PEERS[word]
    if version not in versions:
        known = " or ".join(versions)
        raise UserError(f"{path}:1: got a recording of {word} {version!r}, expected version {known}")
    replayed = scheduler if "requests" in header else manager
    if replayed is None:
        raise UserError(f"{path}:1: got requests, expected a recording of {word}'s manager, which has none")
    form, driver = replayed
    form.check_header(path, header)
    return form, driver(
        {
            **header,
            "config": _given(header["config"]),
            "requests": [_given(row) for row in header.get("requests", ())],
        }
    )


def _given(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def replay(path: Path) -> int:
    """Replay one recorded file; the number of operations compared. Raises Difference or UserError."""
    header, operations = read(path)
    form, driver = build(path, header)
    for number, row in enumerate(operations, 2):
        form.check_operation(path, number, row["op"])
        try:
            out, state = driver.perform(row["op"])
        except Misuse as error:
            raise UserError(f"{path}:{number}: op: {error}, after {json.dumps(row['op'])}") from error
        except _FAULTS as error:
            raise Difference(
                f"{path}:{number}: ours raises {error!r}, after {json.dumps(row['op'])}"
            ) from error
        if "engine_error" in row["out"]:  # the engine died where ours gives one group up
            if not driver.gave_up:
                raise Difference(f"{path}:{number}: out.engine_error: expected an engine error, got none")
            return number - 1
        for part, ours in (("out", out), ("state", state)):
            expected = row[part]
            for field in sorted(expected.keys() | ours.keys()):
                if expected.get(field) != ours.get(field):
                    raise Difference(
                        f"{path}:{number}: {part}.{field}: expected {expected.get(field)}, "
                        f"got {ours.get(field)}, after {json.dumps(row['op'])}"
                    )
        try:
            driver.check_integrity()
        except IntegrityError as error:
            raise Difference(f"{path}:{number}: our books: {error}, after {json.dumps(row['op'])}") from error
    return len(operations)


def run_parity(paths: Sequence[Path]) -> int:
    """Replay files, a line for each; 0 all equal, 1 something differs. Raises UserError behind the last file."""
    differ = False
    wrong = []
    for path in paths:
        try:
            print(f"{path}: ok, {replay(path)} operations", flush=True)
        except Difference as difference:
            differ = True
            print(difference, flush=True)
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))
    return int(differ)
