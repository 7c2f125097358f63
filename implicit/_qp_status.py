"""What the parts of the QP solver tell each other: what was asked for, and how the solution of one QP ended."""

from __future__ import annotations

from typing import NamedTuple

SOLVED, INFEASIBLE, STOPPED, UNBOUNDED, INDEFINITE, NOT_UNIQUE, INACCURATE, NOT_FINITE = range(8)


class Options(NamedTuple):
    """What is asked for.

    Attributes:
        free: how many of the rows, the first ones, are equalities.
        tol: largest violation of the optimality conditions, relative to their terms.
        max_iter: of rows that enter or leave the active set.
        span: a row nearer than this (squared, relative) to the span of the active ones counts as dependent on them.
    """

    free: int
    tol: float
    max_iter: int
    span: float = 1e-12
