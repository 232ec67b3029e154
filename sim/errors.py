"""Errors that speak to the user."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """The user's mistake: the command line prints the message alone and exits with code 2."""


class Stalled(RuntimeError):
    """Nothing can proceed any more; the message says which request needs what."""


class IntegrityError(RuntimeError):
    """An allocator's books do not add up; the message names the equation that failed."""


class ProbeError(RuntimeError):
    """A slot does not hold what the tables say; the message names step, sequence, token and slot.

    `evidence` is the memory as it was found (`Ledger.evidence`), where somebody kept it.
    """

    evidence: dict[str, Any] | None = None
