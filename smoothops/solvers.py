"""How a programme without closed form is solved: an option of the regularizer."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("raise", "warn", "ignore")


@dataclass(frozen=True, eq=False)
class Sinkhorn:
    """Sinkhorn's matrix scaling for Entropy on Birkhoff and Transport: ``so.Entropy(eps, solver=so.Sinkhorn(1e-12))``.

    Sweeps with potentials in logarithms, from large to small eps; Newton steps on the potentials where sweeps are slow.
    In rank, sort and what is made of them, a solver asks for their programme over Birkhoff: sort is P x, rank P' rho,
    P the soft argsort.

    Args:
        tol: bound on sum |P 1 - a| + sum |P' 1 - b|, relative to sum a; None: 1e-10, or 1e-7 for float32 and narrower
            input. Where rounding in theta/eps allows no more, that counts as converged.
        max_iter: number of sweeps (a Newton step counts as one).
        on_fail: "raise" a ValueError, "warn", or "ignore" where a matrix has not converged; see Transport.potentials.

    Source: Cuturi 2013, "Sinkhorn distances"; Schmitzer 2019, "Stabilized sparse scaling algorithms"; Brauer, Clason,
    Lorenz, Wirth 2017, "A Sinkhorn-Newton method for entropic optimal transport".

    Example:
        >>> so.Birkhoff().argmax(torch.eye(2), so.Entropy(1.0, solver=so.Sinkhorn(max_iter=100)))
        tensor([[0.7311, 0.2689],
                [0.2689, 0.7311]])
    """

    tol: float | None = None
    max_iter: int = 5000
    on_fail: str = "raise"

    def __post_init__(self) -> None:
        if self.tol is not None and not (isinstance(self.tol, (int, float)) and self.tol > 0):
            raise ValueError(f"Sinkhorn tol must be a positive number or None, got {self.tol!r}")
        if isinstance(self.max_iter, bool) or not isinstance(self.max_iter, int) or self.max_iter < 1:
            raise ValueError(f"Sinkhorn max_iter must be an int >= 1, got {self.max_iter!r}")
        if self.on_fail not in POLICIES:
            raise ValueError(f"Sinkhorn on_fail must be one of {', '.join(POLICIES)}, got {self.on_fail!r}")
