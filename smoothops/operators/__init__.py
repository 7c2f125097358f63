"""The drop-in operators: encode the input as a linear programme over a polytope, smooth it, decode the answer."""

from .choice import Extremum, amax, amin, argmax, argmin, entmax, max, min, sparsemax, topk_mask
from .matrices import argsort, argtopk, soft_permutation
from .order import isotonic, rank, sort, topk
from .quantiles import kthvalue, median, quantile
from .strength import mixing_eps

__all__ = [
    "Extremum",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "argsort",
    "argtopk",
    "entmax",
    "isotonic",
    "kthvalue",
    "max",
    "median",
    "min",
    "mixing_eps",
    "quantile",
    "rank",
    "soft_permutation",
    "sort",
    "sparsemax",
    "topk",
    "topk_mask",
]
