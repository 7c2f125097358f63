"""The point of a polytope nearest to u, from a linear maximization oracle alone (Wolfe 1976), in numpy.

An active set S of affinely independent vertices holds y as a convex combination. A major step asks the oracle for the
vertex v that maximizes <u - y, v> and adds it; minor steps go to the nearest point of the affine hull of S, dropping
vertices whose weight would become negative. |u - y| falls at each major step, so no S comes back: it ends, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Oracle = Callable[[np.ndarray], np.ndarray]
ROUNDING = 64 * 2.0**-52
NEARBY = 1e-8  # how far theta moves to see the rest of a face
SAME = 1e-10  # vertices whose values differ by no more lie on one face


def project(oracle: Oracle, rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """For each u of ``rows`` (count, n) its active vertices (k, n) and its projection."""
    first = oracle(rows)
    active, weights, y = [v[None] for v in first], [np.ones(1) for _ in first], first.astype(np.float64)
    running = np.arange(len(rows))
    limit = 1000 + 50 * rows.shape[1]
    for _ in range(limit):
        slope = rows[running] - y[running]
        left = []
        for i, g, v in zip(running, slope, oracle(slope), strict=True):
            far, wide = np.abs(g).max(), np.abs(v).max() + np.abs(y[i]).max()
            noise = ROUNDING * len(g) * far * wide
            if far <= ROUNDING * (np.abs(rows[i]).max() + wide) or g @ (v - y[i]) <= noise:
                continue  # u itself, or no vertex is better by more than rounding
            if (active[i] == v).all(1).any():
                continue
            found, shares = minor(rows[i], np.vstack([active[i], v]), np.append(weights[i], 0.0))
            moved = shares @ found
            if (moved - y[i]) @ (rows[i] - (moved + y[i]) / 2) <= 0:
                continue  # |u - y| no longer falls: only rounding is left
            active[i], weights[i], y[i] = found, shares, moved
            left.append(i)
        running = np.array(left, dtype=np.int64)
        if not left:
            return active, y
    raise RuntimeError(
        f"the projection of rows {running[:8].tolist()} has not ended after {limit} vertices; does the oracle return "
        "a vertex with the largest <theta, y>, the same one for the same theta?"
    )


def minor(u: np.ndarray, vertices: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The vertices that carry the nearest point of their convex hull, and their weights, from a feasible start."""
    while True:
        target = affine(u, vertices)
        if (target > 0).all():
            return vertices, target
        falls = target <= 0
        steps = weights[falls] / np.maximum(weights[falls] - target[falls], 1e-300)
        t = min(1.0, steps.min())
        weights = (1 - t) * weights + t * target
        drop = np.flatnonzero(falls)[steps <= t]
        keep = np.setdiff1d(np.arange(len(weights)), drop)
        if len(keep) == 0:
            keep = np.array([weights.argmax()])
        vertices, weights = vertices[keep], np.maximum(weights[keep], 0.0)
        weights = weights / weights.sum()


def affine(u: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Weights with sum 1 of the point of the affine hull nearest to u."""
    if len(vertices) == 1:
        return np.ones(1)
    edges = vertices[1:] - vertices[0]
    rest = np.linalg.lstsq(edges.T, u - vertices[0], rcond=None)[0]
    return np.append(1.0 - rest.sum(), rest)


def face(oracle: Oracle, u: np.ndarray, y: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """An orthonormal basis (n, n), padded by zeros, of the directions of the face that maximizes <u - y, .>.

    The active vertices span it unless u is in special position, such as ties; the rest shows when u - y is moved a
    little along a random direction normal to what is known: on a larger face that has another maximum there.
    """
    n = len(u)
    g = u - y
    size = np.abs(u).max() + np.abs(vertices).max()
    g = np.where(np.abs(g).max() <= ROUNDING * n * size, 0.0, g)
    scale = np.abs(g).max()
    basis = orthonormal((vertices[1:] - vertices[0]).T)
    generator = np.random.default_rng(0)
    while basis.shape[1] < n:
        d = generator.standard_normal(n)
        d -= basis @ (basis.T @ d)
        d /= np.abs(d).max()
        moved = np.stack([d, -d]) if scale == 0 else g + NEARBY * scale * np.stack([d, -d])
        edges = oracle(moved) - vertices[0]
        on = np.abs(edges @ g) <= SAME * scale * (1 + np.abs(edges).max(1))
        new = edges[on].T
        new = new - basis @ (basis.T @ new)
        new = new[:, np.abs(new).max(0) > 1e-9 * (1 + np.abs(vertices).max())] if new.size else new
        if new.shape[1] == 0:
            break
        basis = orthonormal(np.hstack([basis, new]))
    return np.hstack([basis, np.zeros((n, n - basis.shape[1]))])


def orthonormal(columns: np.ndarray) -> np.ndarray:
    if columns.shape[1] == 0:
        return columns
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return left[:, sizes > 1e-10 * sizes[0]] if sizes[0] > 0 else left[:, :0]
