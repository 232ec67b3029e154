"""Step times from measured operator tables."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from pathlib import Path

from sim.errors import UserError
from sim.hardware import Device, Model
from sim.registry import NonNegativeFloat, PositiveInt
from sim.step import Step
from sim.timing.base import StepTime, timing

LINEAR = ("linear_ops", ("num_tokens", "linear_per_layer_ms"))
DECODE = ("attn_decode", ("batch_size", "kv_cache_size", "attn_decode_per_layer_ms"))
PREFILL = ("attn_prefill", ("kv_cache_size", "prefill_chunk_size", "attn_prefill_per_layer_ms"))


@timing("table")
class Table(StepTime):
    """Sums of operator times looked up in tables, as Vidur profiles them (Agrawal et al., MLSys 2024).

    Three CSV files in one folder, milliseconds per layer, told apart by the end of their names:
    `*linear_ops.csv` (num_tokens, linear_per_layer_ms), `*attn_decode.csv` (batch_size, kv_cache_size,
    attn_decode_per_layer_ms; kv_cache_size is the mean context of the batch) and `*attn_prefill.csv`
    (kv_cache_size, prefill_chunk_size, attn_prefill_per_layer_ms; prompts of a step are folded into one of
    the root of the sum of their squares). A value between two entries takes the upper one, a value past the
    last is scaled from it in proportion. One fused step: linear layers over all tokens, then attention for
    the decodes and for the prompts, added.

    Fields:
        tables: Folder of the three tables.
        num_layers: Layers of the model; by default those of the experiment's model.
        step_overhead_ms: Time per step beside the operators.
    """

    def __init__(
        self,
        model: Model | None,
        device: Device | None,
        *,
        tables: Path,
        num_layers: PositiveInt | None = None,
        step_overhead_ms: NonNegativeFloat = 0.0,
    ) -> None:
        if num_layers is None and model is None:
            raise UserError("timing table needs num_layers, or an experiment that names its model")
        layers = num_layers if num_layers is not None else model.num_layers  # type: ignore[union-attr]
        self.per_layer = layers / 1e3
        self.overhead = step_overhead_ms / 1e3
        self.linear = _Curve({key[0]: value for key, value in _read(tables, *LINEAR).items()})
        self.decode = _Surface(_read(tables, *DECODE))
        prompts = {key[1]: value for key, value in _read(tables, *PREFILL).items() if key[0] == 0}
        if not prompts:
            raise UserError(f"timing.tables: no row with kv_cache_size 0 in *{PREFILL[0]}.csv of {tables}")
        self.prefill = _Curve(prompts)

    def seconds(self, step: Step) -> float:
        """Linear layers over all tokens and attention of both kinds."""
        squares = sum([tokens * (2 * start + tokens) for _, start, tokens in step.chunks])
        prefill = self.prefill(math.sqrt(squares)) if step.chunks else 0.0
        return self._total(step.num_decodes, step.decode_context, step.num_prefill_tokens, prefill)

    def decode_seconds(self, num_decodes: int, context: int) -> float:
        """One token for each sequence."""
        return self._total(num_decodes, context, 0, 0.0)

    def _total(self, num_decodes: int, context: int, prefill_tokens: int, prefill: float) -> float:
        decode = self.decode(num_decodes, context / num_decodes) if num_decodes else 0.0
        linear = self.linear(num_decodes + prefill_tokens)
        return self.overhead + self.per_layer * (linear + decode + prefill)


class _Curve:
    """A step function through the entries of a table of one key."""

    def __init__(self, entries: dict[int, float]) -> None:
        self.keys = sorted(entries)
        self.values = [entries[key] for key in self.keys]

    def __call__(self, key: float) -> float:
        index = bisect_left(self.keys, key)
        if index < len(self.keys):
            return self.values[index]
        return self.values[-1] * (key / self.keys[-1]) if self.keys[-1] else self.values[-1]


class _Surface:
    """A step function of two keys: a curve over the second for every entry of the first."""

    def __init__(self, entries: dict[tuple[int, ...], float]) -> None:
        self.keys = sorted({key[0] for key in entries})
        curves: dict[int, dict[int, float]] = {key: {} for key in self.keys}
        for (first, second), value in entries.items():
            curves[first][second] = value
        self.curves = [_Curve(curves[key]) for key in self.keys]

    def __call__(self, first: float, second: float) -> float:
        index = bisect_left(self.keys, first)
        if index < len(self.keys):
            return self.curves[index](second)
        return self.curves[-1](second) * (first / (self.keys[-1] or 1))


def _read(folder: Path, ending: str, columns: tuple[str, ...]) -> dict[tuple[int, ...], float]:
    """The named columns of the one file `*<ending>.csv`: key columns to the last one. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"timing.tables: {folder} is not a folder")
    paths = sorted(folder.glob(f"*{ending}.csv"))
    if len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "none"
        raise UserError(f"timing.tables: expected one file *{ending}.csv in {folder}, found {found}")
    entries: dict[tuple[int, ...], float] = {}
    try:
        with paths[0].open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            for name in columns:
                if name not in header:
                    raise UserError(f"{paths[0]}:1: no column {name!r}, found {', '.join(header)}")
            places = [header.index(name) for name in columns]
            for row in rows:
                if not row:
                    continue
                try:
                    *key, value = (row[place] for place in places)
                    keys, time = tuple(int(part) for part in key), float(value)
                    if min(keys) < 0 or not 0 <= time < math.inf:
                        raise ValueError
                except (IndexError, ValueError):
                    where = f"{paths[0]}:{rows.line_num}"
                    raise UserError(
                        f"{where}: expected numbers from 0 for {', '.join(columns)}, got {', '.join(row)}"
                    ) from None
                entries[keys] = time
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{paths[0]}: cannot be read: {error}") from None
    if not entries:
        raise UserError(f"{paths[0]}: no rows under the header")
    return entries
