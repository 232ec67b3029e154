"""Timing models: seconds for a step. Importing the package registers the built-in ones."""

from sim.timing.aisimulate import AISimulatePolynomial
from sim.timing.base import StepTime, timing
from sim.timing.calibrated import Calibrated
from sim.timing.fixed import Fixed
from sim.timing.linear import Linear
from sim.timing.roofline import Roofline
from sim.timing.table import Table
from sim.timing.transfers import Transfers
from sim.timing.vidur import Vidur

__all__ = [
    "AISimulatePolynomial",
    "Calibrated",
    "Fixed",
    "Linear",
    "Roofline",
    "StepTime",
    "Table",
    "Transfers",
    "Vidur",
    "timing",
]
