"""A stopwatch: what a witness costs between samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sim.witness import Witness

EVENTS = [name for name in vars(Witness) if not name.startswith("_")]


class Stopwatch:
    """Tells a witness of everything that it is told, and adds up the CPU seconds that takes, `cpu_s`."""

    def __init__(self, witness: Witness) -> None:
        self.cpu_s = 0.0
        for name in EVENTS:
            setattr(self, name, self._timed(getattr(witness, name)))

    def _timed(self, event: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*what: Any) -> Any:
            begin = time.process_time()
            answer = event(*what)
            self.cpu_s += time.process_time() - begin
            return answer

        return timed

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"a witness is told of {', '.join(EVENTS)}, not of {name}")
