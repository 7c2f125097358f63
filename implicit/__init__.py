"""implicit: exact gradients through roots, fixed points, minimizers and linear solves, for PyTorch.

A solution z of F(z, theta) = 0 moves with theta as z' = -J^-1 F_theta, J = dF/dz, whatever computed it.
The package stands alone and knows nothing of smoothops.
"""

from . import conditions
from ._loop import Info
from .adjoint import Implicit, OneStep, Phantom, Truncated, Unroll, attach
from .bilevel import hypergradient
from .equilibrium import Equilibrium
from .fixed_point import Anderson, Picard, custom_fixed_point, fixed_point
from .linear import (
    CG,
    GMRES,
    LU,
    Auto,
    BiCGStab,
    Cholesky,
    ConvergenceError,
    LinearOperator,
    LstSq,
    Neumann,
    NormalCG,
    linear_solve,
)
from .minimize import FISTA, LBFGS, GradientDescent, MirrorDescent, minimize
from .program import SCS, Clarabel, HiGHS, Program, program
from .qp import QPInfo, QPSolution, qp
from .report import GradientReport, gradient_report
from .root import Bisection, Broyden, Chord, LevenbergMarquardt, Newton, custom_root, root

__all__ = [
    "CG",
    "FISTA",
    "GMRES",
    "LBFGS",
    "LU",
    "SCS",
    "Anderson",
    "Auto",
    "BiCGStab",
    "Bisection",
    "Broyden",
    "Cholesky",
    "Chord",
    "Clarabel",
    "ConvergenceError",
    "Equilibrium",
    "GradientDescent",
    "GradientReport",
    "HiGHS",
    "Implicit",
    "Info",
    "LevenbergMarquardt",
    "LinearOperator",
    "LstSq",
    "MirrorDescent",
    "Neumann",
    "Newton",
    "NormalCG",
    "OneStep",
    "Phantom",
    "Picard",
    "Program",
    "QPInfo",
    "QPSolution",
    "Truncated",
    "Unroll",
    "attach",
    "conditions",
    "custom_fixed_point",
    "custom_root",
    "fixed_point",
    "gradient_report",
    "hypergradient",
    "linear_solve",
    "minimize",
    "program",
    "qp",
    "root",
]
