"""Control flow with soft decisions: branches and loops on pytrees whose hard limit is the ordinary program."""

from .branches import cond
from .checkpoint import Binomial, Checkpoint, Sqrt
from .loops import fori_loop, scan

__all__ = ["Binomial", "Checkpoint", "Sqrt", "cond", "fori_loop", "scan"]
