"""Polytopes C over which y = argmax_{y in C} <theta, y> - eps Omega(y) is solved."""

from .base import Polytope
from .generic import OraclePolytope
from .permutahedron import OrderPolytope, Permutahedron
from .program import ConvexSet
from .simplex import CappedSimplex, Hypercube, Simplex
from .transport import Birkhoff, Transport

__all__ = [
    "Birkhoff",
    "CappedSimplex",
    "ConvexSet",
    "Hypercube",
    "OraclePolytope",
    "OrderPolytope",
    "Permutahedron",
    "Polytope",
    "Simplex",
    "Transport",
]
