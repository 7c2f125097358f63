"""Control flow with soft decisions: branches and loops on pytrees whose hard limit is the ordinary program."""

from .branches import cond

__all__ = ["cond"]
