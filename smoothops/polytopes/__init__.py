"""Polytopes C over which y = argmax_{y in C} <theta, y> - eps Omega(y) is solved."""

from .base import Polytope
from .generic import OraclePolytope
from .permutahedron import OrderPolytope, Permutahedron
from .program import ConvexSet
from .simplex import CappedSimplex, Hypercube, Simplex

__all__ = [
    "CappedSimplex",
    "ConvexSet",
    "Hypercube",
    "OraclePolytope",
    "OrderPolytope",
    "Permutahedron",
    "Polytope",
    "Simplex",
]
