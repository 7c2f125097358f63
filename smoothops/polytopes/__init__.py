"""Polytopes C over which y = argmax_{y in C} <theta, y> - eps Omega(y) is solved."""

from .base import Polytope
from .permutahedron import OrderPolytope, Permutahedron
from .simplex import CappedSimplex, Hypercube, Simplex
from .transport import Birkhoff, Transport

__all__ = [
    "Birkhoff",
    "CappedSimplex",
    "Hypercube",
    "OrderPolytope",
    "Permutahedron",
    "Polytope",
    "Simplex",
    "Transport",
]
