"""implicit: exact gradients through roots, fixed points, minimizers and linear solves, for PyTorch.

The package is a table of contents for now; it stands alone and knows nothing of smoothops. Its planned names:
attach, root, fixed_point, minimize, linear_solve, qp, program, hypergradient, Equilibrium, conditions.
"""

__all__: list[str] = []
