"""kvsim's simulator: requests through a scheduler and an allocator on a SimPy clock."""

from sim.allocators import Admission, Allocator, Capacity, MemoryUsage, allocator
from sim.errors import IntegrityError, ProbeError, Stalled, UserError
from sim.hardware import Device, Model
from sim.recorder import Recorder
from sim.registry import (
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Registry,
)
from sim.request import Request, Sequence
from sim.schedulers import Scheduler, order, scheduler, victim
from sim.simulation import simulate
from sim.step import Step
from sim.timing import StepTime, Transfers, timing

__all__ = [
    "Admission", "Allocator", "Bounds", "Capacity", "Device", "Fraction", "IntegrityError", "MemoryUsage",
    "Model", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "ProbeError", "Recorder", "Registry",
    "Request", "Scheduler", "Sequence", "Stalled", "Step", "StepTime", "Transfers", "UserError", "allocator",
    "order", "scheduler", "simulate", "timing", "victim",
]  # fmt: skip
