"""The point of a polytope nearest to u, and its face, from a linear maximization oracle alone (Wolfe 1976), in numpy.

An active set S of affinely independent vertices holds y as a convex combination. A major step asks the oracle for the
vertex v that maximizes <u - y, v> and adds it; minor steps go to the nearest point of the affine hull of S, dropping
vertices whose weight would become negative. |u - y| falls at each major step, so no S comes back: it ends, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Oracle = Callable[[np.ndarray], np.ndarray]
ROUNDING = 64 * 2.0**-52
NEARBY = 1e-8  # how far u - y moves to see the rest of a face, relative to itself
SAME = 1e-10  # vertices whose values differ by no more lie on one face
ROUNDS = 20


class Active:
    """A row: u, the active vertices (k, n), their weights, and the point y that these give."""

    def __init__(self, u: np.ndarray, vertex: np.ndarray) -> None:
        self.u, self.vertices, self.weights, self.y = u, vertex[None], np.ones(1), vertex.copy()
        self.basis = np.zeros((len(u), 0))
        self.seen: set[int] = set()

    def gap(self, v: np.ndarray) -> float:
        """<u - y, v - y>, 0 where it may be rounding alone: |u - y| itself is flat at y, and would end far sooner."""
        step = v - self.y
        self.verify(v)
        gap = (self.u - self.y) @ step
        return gap if gap > 2.0**-50 * ((np.abs(self.u) + np.abs(self.y)) @ np.abs(step)) else 0.0

    def verify(self, v: np.ndarray) -> None:
        g = self.u - self.y
        best, given = (self.vertices @ g).max(), v @ g
        if given < best - 1e-6 * np.abs(g).max() * (np.abs(v).sum() + np.abs(self.vertices).sum(1).max()):
            raise ValueError(
                f"the oracle does not maximize: for some theta it returned a vertex with <theta, y> = {given:.6g}, and "
                f"for another one a vertex with {best:.6g} there"
            )

    def add(self, vertices: np.ndarray) -> bool:
        """Take them in, and say whether the active set is one that was not seen before."""
        vertices = np.array([v for v in vertices if not (self.vertices == v).all(1).any()])
        if len(vertices) == 0:
            return False
        found, weights = minor(
            self.u, np.vstack([self.vertices, vertices]), np.append(self.weights, np.zeros(len(vertices)))
        )
        key = hash(frozenset(v.tobytes() for v in found))
        if key in self.seen:
            return False
        self.seen.add(key)
        self.vertices, self.weights, self.y = found, weights, weights @ found
        return True

    def inside(self, tol: float = 0.0) -> bool:
        size = np.abs(self.u).max() + np.abs(self.vertices).max()
        return bool(np.abs(self.u - self.y).max() <= max(ROUNDING * size, tol))


def project(oracle: Oracle, rows: np.ndarray) -> list[Active]:
    """The projection of each u of ``rows`` (count, n) with its active vertices, and the directions of its face."""
    every = [Active(u, v) for u, v in zip(rows, oracle(rows), strict=True)]
    running = every
    for _ in range(ROUNDS):
        descend(oracle, running)
        running = [a for a in running if a.add(complete(oracle, a))]
        if not running:
            break
    return every


def within(oracle: Oracle, rows: np.ndarray, tol: float) -> np.ndarray:
    """Whether each u of ``rows`` lies no further than ``tol`` from the polytope in any coordinate of its projection."""
    every = [Active(u, v) for u, v in zip(rows, oracle(rows), strict=True)]
    descend(oracle, every, tol)
    return np.array([a.inside(tol) for a in every], dtype=bool)


def descend(oracle: Oracle, running: list[Active], tol: float = 0.0) -> None:
    """Major steps, with one call of the oracle for all rows, until no vertex draws y nearer to u, or |u - y| <= tol."""
    limit = 1000 + 100 * len(running[0].u) if running else 1
    for _ in range(limit):
        running = [a for a in running if not a.inside(tol)]
        if not running:
            return
        best = oracle(np.stack([a.u - a.y for a in running]))
        running = [a for a, v in zip(running, best, strict=True) if a.gap(v) > 0 and a.add(v[None])]
    raise RuntimeError(
        f"a projection has not ended after {limit} vertices; does the oracle return a vertex with the largest "
        "<theta, y>, the same one for the same theta?"
    )


def minor(u: np.ndarray, vertices: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vertices that carry the nearest point of their convex hull, and their weights, from a feasible start."""
    while True:
        target = affine(u, vertices)
        if (target > 0).all():
            return vertices, target
        falls = np.flatnonzero(target <= 0)
        steps = weights[falls] / np.maximum(weights[falls] - target[falls], 1e-300)
        t = min(1.0, steps.min())
        weights = np.maximum((1 - t) * weights + t * target, 0.0)
        keep = np.setdiff1d(np.arange(len(weights)), falls[steps <= t])
        if len(keep) == 0:
            keep = np.array([weights.argmax()])
        vertices, weights = vertices[keep], weights[keep] / weights[keep].sum()


def affine(u: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Weights with sum 1 of the point of the affine hull nearest to u."""
    if len(vertices) == 1:
        return np.ones(1)
    edges = (vertices[1:] - vertices[0]).T
    q, r = np.linalg.qr(edges)
    size = np.abs(r.diagonal())
    if len(size) == edges.shape[1] and size.min() > 1e-12 * size.max():
        rest = np.linalg.solve(r, q.T @ (u - vertices[0]))
    else:
        rest = np.linalg.lstsq(edges, u - vertices[0], rcond=None)[0]
    return np.append(1.0 - rest.sum(), rest)


def complete(oracle: Oracle, a: Active) -> np.ndarray:
    """Sets a.basis, orthonormal (n, r), to the directions of the face that maximizes <u - y, .>; returns new vertices.

    The active vertices span it unless u is in special position, such as ties; the rest shows when u - y is moved a
    little along a random direction normal to what is known: on a larger face that has another maximum there.
    """
    n, origin = len(a.u), a.vertices[0]
    g = np.zeros(n) if a.inside() else a.u - a.y
    scale = np.abs(g).max()
    basis = orthonormal((a.vertices[1:] - origin).T)
    generator = np.random.default_rng(0)
    more = [np.zeros((0, n))]
    while basis.shape[1] < n:
        d = generator.standard_normal(n)
        d -= basis @ (basis.T @ d)
        d /= np.abs(d).max()
        found = oracle(np.stack([d, -d]) if scale == 0 else g + NEARBY * scale * np.stack([d, -d]))
        found = found[np.abs((found - a.y) @ g) <= SAME * scale * (1 + np.abs(found).max())]
        edges = (found - origin).T
        edges = edges - basis @ (basis.T @ edges)
        fresh = np.abs(edges).max(0) > 1e-9 * (1 + np.abs(origin).max())
        if not fresh.any():
            break
        more.append(found[fresh])
        basis = np.hstack([basis, orthonormal(edges[:, fresh])])
        basis = np.linalg.qr(basis)[0]
    a.basis = basis
    return np.vstack(more)


def orthonormal(columns: np.ndarray) -> np.ndarray:
    if columns.shape[1] == 0:
        return columns
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > 1e-10 * sizes[0]] if sizes[0] > 0 else left[:, :0]
