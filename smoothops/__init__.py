"""smoothops: soft, differentiable versions of the operations that stop gradients, for PyTorch.

Every operator is one equation, y = argmax_{y in C} <theta, y> - eps Omega(y): a polytope C, a smoothing, an encoding.
Use it as ``import smoothops as so``; names that shadow builtins (max, min, sort) follow torch.
"""

# ruff: noqa: I001, RUF022  - the order below is the reading order
from .smoothing import Hard, Smoothing, StraightThrough, straight_through
from ._regularizer import Mixing, Regularizer
from .regularizers import BinaryEntropy, Entropy, Laplace, Quadratic, Tsallis
from .relaxations import NeuralSort, SoftSort
from .sorting_network import Bitonic, Cauchy, OddEven, Optimal, Reciprocal, SortingNetwork
from .stochastic import Perturbed
from .noises import Gumbel, Logistic, Normal
from .solvers import Sinkhorn
from .polytopes import (
    Birkhoff,
    CappedSimplex,
    ConvexSet,
    Hypercube,
    OraclePolytope,
    OrderPolytope,
    Permutahedron,
    Polytope,
    Simplex,
    Transport,
)
from .elementwise import abs, ceil, clamp, floor, heaviside, maximum, minimum, relu, round, sign
from .operators import (
    amax,
    amin,
    argmax,
    argmin,
    argsort,
    argtopk,
    entmax,
    isotonic,
    kthvalue,
    max,
    median,
    min,
    mixing_eps,
    quantile,
    rank,
    soft_permutation,
    sort,
    sparsemax,
    topk,
    topk_mask,
)
from .comparisons import between, eq, ge, gt, isclose, le, lt, ne
from .logic import (
    Godel,
    Logic,
    Lukasiewicz,
    Product,
    all,
    any,
    implies,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
)
from .selection import (
    bucketize,
    gather,
    index_select,
    lookup,
    narrow,
    scatter,
    searchsorted,
    take,
    take_along_dim,
    where,
)
from .control import (
    Binomial,
    FinalState,
    LoopInfo,
    Readout,
    Sample,
    Sqrt,
    cond,
    fori_loop,
    scan,
    switch,
    while_loop,
)
from .soften import soften
from .softened import softened
from . import losses, metrics, nn
from .fenchel_young import FenchelYoung

__version__ = "0.1.0"

__all__ = [
    # smoothings
    "Smoothing",
    "Hard",
    "StraightThrough",
    "straight_through",
    # regularizers
    "Regularizer",
    "Quadratic",
    "Entropy",
    "Tsallis",
    "BinaryEntropy",
    "Laplace",
    "Mixing",
    "mixing_eps",
    # relaxations of a sort
    "SoftSort",
    "NeuralSort",
    "SortingNetwork",
    "Cauchy",
    "Reciprocal",
    "Optimal",
    "Bitonic",
    "OddEven",
    # noise
    "Perturbed",
    "Normal",
    "Gumbel",
    "Logistic",
    # polytopes
    "Polytope",
    "Simplex",
    "CappedSimplex",
    "Hypercube",
    "Permutahedron",
    "OrderPolytope",
    "ConvexSet",
    "OraclePolytope",
    "Birkhoff",
    "Transport",
    "Sinkhorn",
    # operators
    "argmax",
    "argmin",
    "amax",
    "amin",
    "max",
    "min",
    "sparsemax",
    "entmax",
    "sort",
    "argsort",
    "argtopk",
    "soft_permutation",
    "rank",
    "topk",
    "kthvalue",
    "median",
    "quantile",
    "topk_mask",
    "isotonic",
    # elementwise
    "heaviside",
    "sign",
    "relu",
    "abs",
    "maximum",
    "minimum",
    "clamp",
    "floor",
    "ceil",
    "round",
    # comparisons
    "gt",
    "ge",
    "lt",
    "le",
    "eq",
    "ne",
    "isclose",
    "between",
    # logic
    "Logic",
    "Product",
    "Godel",
    "Lukasiewicz",
    "logical_and",
    "logical_or",
    "logical_not",
    "logical_xor",
    "implies",
    "all",
    "any",
    # selection
    "where",
    "take",
    "take_along_dim",
    "index_select",
    "narrow",
    "gather",
    "scatter",
    "lookup",
    "bucketize",
    "searchsorted",
    # control flow
    "cond",
    "switch",
    "fori_loop",
    "scan",
    "while_loop",
    "FinalState",
    "Readout",
    "Sample",
    "LoopInfo",
    "Sqrt",
    "Binomial",
    # existing code
    "soften",
    "softened",
    # losses and metrics
    "FenchelYoung",
    "losses",
    "nn",
    "metrics",
]
