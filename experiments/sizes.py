"""Sizes of memory as people write them: `12 GiB`."""

from __future__ import annotations

import re
from typing import Annotated

IN_BYTES = "bytes"
"""Marks an integer that the YAML may give with a unit."""

Size = Annotated[int, IN_BYTES]

PATTERN = r"^\s*(\d+(?:\.\d*)?)\s*([KMGT]i?)?B?\s*$"
_STEPS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes in a text; `GiB` counts by 1024, `GB` by 1000. Raises ValueError if it is no size.

    >>> parse_size("12 GiB"), parse_size("1.5MB")
    (12884901888, 1500000)
    """
    found = re.match(PATTERN, text)
    if not found:
        raise ValueError(f"not a size: {text!r}")
    prefix = found[2] or ""
    step = 1024 if prefix.endswith("i") else 1000
    return round(float(found[1]) * float(step ** _STEPS[prefix[:1]]))
