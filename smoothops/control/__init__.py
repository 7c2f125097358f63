"""Control flow with soft decisions: branches and loops on pytrees whose hard limit is the ordinary program."""

from .branches import cond, switch
from .checkpoint import Binomial, Checkpoint, Sqrt
from .halting import FinalState, LoopInfo, Mean, Readout, Sample, while_loop
from .loops import fori_loop, scan

__all__ = [
    "Binomial",
    "Checkpoint",
    "FinalState",
    "LoopInfo",
    "Mean",
    "Readout",
    "Sample",
    "Sqrt",
    "cond",
    "fori_loop",
    "scan",
    "switch",
    "while_loop",
]
