"""Ordinary Python functions made differentiable: their conditions on tensors split the run into weighted worlds."""

from .decorator import Softened, soften
from .errors import SoftenError

__all__ = ["SoftenError", "Softened", "soften"]
