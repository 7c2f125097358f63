"""Argsorts of finite rows on the CPU (numba): an item is one 64-bit key, its order-preserving bits and its index.

One radix sort over the high half of the keys is several times faster than a comparison sort that carries an index, is
stable, and needs no vector instructions; short rows are left to numpy, whose sort of plain integers is vectorized.
"""

from __future__ import annotations

import numpy as np

from .cpu import jit

SHORT = 300  # up to this length numpy's sort of the keys is the fastest
INDEX = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
SIGN, LIMIT = np.int64(-(2**31)), np.int64(0x7F800000)  # of a float32; LIMIT: the bits of infinity
WIDE_SIGN, WIDE_LIMIT = np.int64(-(2**63)), np.int64(0x7FF0000000000000)
RUN = 24  # equal upper halves of float64: up to this many are sorted by insertion


@jit
def pack(bits, flip, keys):  # type: ignore[no-untyped-def]
    """Keys of float32 numbers given as int32; ``flip`` reverses the order. False where one is not finite."""
    turn = np.int64(0xFFFFFFFF) if flip else np.int64(0)
    largest = np.int64(0)
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            b = np.int64(bits[r, i])
            largest = max(largest, b & np.int64(0x7FFFFFFF))
            b = np.int64(0) if b == SIGN else b  # -0 is 0
            b = (b ^ ((b >> np.int64(31)) & np.int64(0x7FFFFFFF))) - SIGN
            keys[r, i] = (np.uint64(b ^ turn) << HALF) | np.uint64(i)
    return largest < LIMIT


@jit(inline="always")
def _ordered(b, flip):  # type: ignore[no-untyped-def]
    """The bits of a float64, as int64, such that they order as the numbers do."""
    b = np.int64(0) if b == WIDE_SIGN else b
    u = np.uint64((b ^ ((b >> np.int64(63)) & ~WIDE_SIGN)) ^ WIDE_SIGN)
    return ~u if flip else u


@jit
def pack_wide(bits, flip, keys):  # type: ignore[no-untyped-def]
    """As :func:`pack`, from the upper halves of float64 numbers; :func:`refine` then sorts by the lower ones."""
    largest = np.int64(0)
    for r in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            largest = max(largest, bits[r, i] & ~WIDE_SIGN)
            keys[r, i] = (_ordered(bits[r, i], flip) & ~INDEX) | np.uint64(i)
    return largest < WIDE_LIMIT


@jit
def refine(bits, flip, keys):  # type: ignore[no-untyped-def]
    """Sorts the items of equal upper half by their lower half, and by index where that is equal too."""
    n = keys.shape[1]
    for r in range(keys.shape[0]):
        begin = 0
        while begin < n:
            end = begin + 1
            while end < n and (keys[r, end] ^ keys[r, begin]) >> HALF == 0:
                end += 1
            if end - begin > 1:
                upper = keys[r, begin] & ~INDEX
                run = keys[r, begin:end]
                for j in range(end - begin):
                    i = run[j] & INDEX
                    run[j] = (_ordered(bits[r, i], flip) << HALF) | i
                if end - begin <= RUN:
                    for j in range(1, end - begin):
                        key, i = run[j], j
                        while i > 0 and run[i - 1] > key:
                            run[i] = run[i - 1]
                            i -= 1
                        run[i] = key
                else:
                    run.sort()
                for j in range(end - begin):
                    run[j] = upper | (run[j] & INDEX)
            begin = end


@jit
def _radix(keys, other):  # type: ignore[no-untyped-def]
    """Sorts each row by the upper half of its keys, stably, a byte at a time; ``other`` is a row of scratch."""
    n = keys.shape[1]
    counts = np.empty((4, 256), np.int64)
    for r in range(keys.shape[0]):
        counts[:] = 0
        for i in range(n):
            k = keys[r, i] >> HALF
            for p in range(4):
                counts[p, (k >> np.uint64(8 * p)) & np.uint64(255)] += 1
        source, target, odd = keys[r], other, False
        for p in range(4):
            place, shift = counts[p], np.uint64(32 + 8 * p)
            if place[(source[0] >> shift) & np.uint64(255)] == n:
                continue  # all have the same byte here
            total = np.int64(0)
            for d in range(256):
                count = place[d]
                place[d] = total
                total += count
            for i in range(n):
                k = source[i]
                d = (k >> shift) & np.uint64(255)
                target[place[d]] = k
                place[d] += 1
            source, target, odd = target, source, not odd
        if odd:
            keys[r, :] = source


def sorted_keys(x: np.ndarray, flip: bool, keys: np.ndarray, scratch: np.ndarray) -> bool:
    """Fills ``keys`` (rows, n) with x's keys in ascending order (descending for ``flip``), ties by index.

    x: (rows, n) float32 or float64, contiguous; scratch: n numbers of 8 bytes. False, and no order, where an item of x
    is not finite.
    """
    wide = x.dtype == np.float64
    bits = x.view(np.int64 if wide else np.int32)
    if not (pack_wide if wide else pack)(bits, flip, keys):
        return False
    if x.shape[1] <= SHORT:
        keys.sort(axis=-1)
    else:
        _radix(keys, scratch)
    if wide:
        refine(bits, flip, keys)
    return True
