"""Validation: every implementation of paged attention against plain attention in float64, over the whole matrix.

Bounds (max over the elements of a sequence's output; `ref` is plain attention in float64 over the history kept
aside; nothing is relaxed for any implementation):

- float32: `|out - ref| <= 1e-5 * max(1, max|ref|)` and `<= 1e-5 * max|v|`; on queries x10, where torch's own
  attention leaves that bound too, at most twice the error of scaled_dot_product_attention, both over all of these
  batches together (which of two roundings is luckier in one batch says nothing).
- float16, bfloat16: at most twice the error of scaled_dot_product_attention over the same batch in the same type;
  inputs are rounded to it before both, and before `ref`. Triton's interpreter is not held to it in bfloat16: it cuts
  off where a GPU rounds to nearest, which doubles the error.
- log-sum-exp, in every type: `|lse - ref| <= 1e-5 * max(1, |ref|)`, element by element.
- What is swapped comes back to the bit: K, V, and what attention makes of them.
- A small transformer that decodes with sharing chooses as over plain K and V, but where scores are closer than
  1e-4; through swap it says the same to the bit, after recomputing the same tokens with scores within 1e-5.
- What is quantised: within the bound of `attention/quantization.py`, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attention.functional import IMPLEMENTATIONS, implementation, paged_attention
from attention.validation.continued import continued
from attention.validation.matrix import SHARPER, matrix
from attention.validation.swapped import swapped
from attention.validation.twin import Problem

TOLERANCE = 1e-5
LSE = "log-sum-exp"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Attend = Callable[..., Any]
"""As `paged_attention`, without its `impl`."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: one property of one implementation in one type.

    `error` and `bound` belong to the case whose error is the largest `share` of its bound; where cases are
    `pooled` they are the largest of all cases, each for itself.
    """

    name: str
    implementation: str
    dtype: str
    cases: int
    error: float
    bound: float
    pooled: bool = False

    @property
    def share(self) -> float:
        """The error's share of its bound; infinite for what is not a number."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.bound if self.bound and self.error == self.error else float("inf")

    @property
    def ok(self) -> bool:
        """Whether the bound holds."""
        return self.share <= 1.0

    def and_also(self, other: Row) -> Row:
        """Both as one line."""
        cases = self.cases + other.cases
        if self.pooled:
            error, bound = max(self.error, other.error), max(self.bound, other.bound)
        else:
            worse = max(self, other, key=lambda row: row.share)
            error, bound = worse.error, worse.bound
        return replace(self, cases=cases, error=error, bound=bound)


def implementations(device: torch.device) -> dict[str, Attend]:
    """Those that run on a device, by name."""
    found: dict[str, Attend] = {}
    for name in ("reference", "torch", "triton"):
        if _takes(name, 64, torch.float32, device):
            found[name] = partial(paged_attention, impl=name)
    return found


def validate(
    device: torch.device,
    among: Mapping[str, Attend] | None = None,
    *,
    small: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Solve the matrix with every implementation and compare; the lines of the table.

    Args:
        device: Where caches lie.
        among: What to validate; by default all implementations that run on the device.
        small: A matrix of few, small problems. Triton's interpreter gets that one in any case.
        progress: Told what is being validated.
    """
    among = implementations(device) if among is None else among
    rows: dict[tuple[str, str, str], Row] = {}
    slow = {name: attend for name, attend in among.items() if _interpreted(name, device)}
    fast = {name: attend for name, attend in among.items() if name not in slow}
    for solvers, few in ((fast, small), (slow, True)):
        for dtype in (torch.float32, torch.float16) if solvers is slow else DTYPES:
            for row in _rows(solvers, dtype, device, few, progress) if solvers else ():
                key = row.name, row.implementation, row.dtype
                rows[key] = rows[key].and_also(row) if key in rows else row
    for impl in [name for name in fast if name in IMPLEMENTATIONS]:
        progress(f"decoding, {impl}")
        for name, error, bound in continued(impl, device):
            rows[name, impl, "float32"] = Row(name, impl, "float32", 1, error, bound)
    return sorted(rows.values(), key=partial(_place, list(rows)))


def _place(order: list[tuple[str, str, str]], row: Row) -> tuple[int, ...]:
    """Lines of one property stand together, in the order of the matrix; what all problems add to comes last."""
    names, impls, dtypes = (list(dict.fromkeys(part)) for part in zip(*order, strict=True))
    names.sort(key=LSE.__eq__)
    return names.index(row.name), dtypes.index(row.dtype), impls.index(row.implementation)


def _rows(
    among: Mapping[str, Attend],
    dtype: torch.dtype,
    device: torch.device,
    small: bool,
    progress: Callable[[str], None],
) -> Iterator[Row]:
    """One row for each comparison."""
    for name, problem in matrix(dtype, device, small=small):
        progress(f"{name}, {_told(dtype)}")
        for impl, attend in among.items():
            if _takes(impl, problem.form.head_dim, dtype, device):
                yield from _solved(name, impl, attend, problem, dtype)
    progress(f"swapping, {_told(dtype)}")
    for name, impl, error, bound in swapped(dtype, device, among):
        yield Row(name, impl, _told(dtype), 1, error, bound)


def _solved(name: str, impl: str, attend: Attend, problem: Problem, dtype: torch.dtype) -> Iterator[Row]:
    """The lines of one problem: without the log-sum-exp, where faster ways may be taken, and with it."""
    expected, expected_lse = problem.expected
    told = _told(dtype)
    out = attend(**problem.arguments)
    again, lse = attend(**problem.arguments, return_lse=True)
    for got in (out, again):
        error, bound = _worst(name, got.cpu().double(), expected, problem, dtype)
        yield Row(name, impl, told, 1, error, bound, pooled=name == SHARPER)
    bounds = TOLERANCE * expected_lse.abs().clamp(min=1)
    errors = (lse.cpu().double() - expected_lse).abs().nan_to_num(torch.inf)
    place = int((errors / bounds).argmax())
    yield Row(LSE, impl, told, 1, float(errors.flatten()[place]), float(bounds.flatten()[place]))


def _worst(
    name: str, out: Tensor, expected: Tensor, problem: Problem, dtype: torch.dtype
) -> tuple[float, float]:
    """(error, bound) where the share is largest."""
    errors = (out - expected).abs().nan_to_num(torch.inf)
    if dtype != torch.float32 or name == SHARPER:
        return float(errors.max()), 2 * problem.error_of_torch
    found = []
    for rows, (_, v) in zip(problem.rows, problem.histories, strict=True):
        bound = TOLERANCE * min(max(1.0, float(expected[rows].abs().max())), float(v.abs().max()))
        found.append((float(errors[rows].max()), bound))
    return max(found, key=lambda pair: pair[0] / pair[1])


def _takes(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an implementation runs there; one that is not ours is taken to run anywhere."""
    if name not in IMPLEMENTATIONS:
        return True
    try:
        implementation(name, head_dim, dtype, device)
    except ValueError:
        return False
    return True


def _interpreted(name: str, device: torch.device) -> bool:
    """Whether Triton's interpreter runs it, in about a second for a small problem."""
    return name == "triton" and device.type == "cpu"


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
