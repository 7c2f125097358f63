"""Ordinary programs for the tests of soften: plain Python, as a textbook has them."""

from __future__ import annotations

import math


def bubble_sort(a):
    n = len(a)
    for i in range(n):
        for j in range(n - 1 - i):
            if a[j] > a[j + 1]:
                a[j], a[j + 1] = a[j + 1], a[j]
    return a


def insertion_sort(a):
    for i in range(1, len(a)):
        key = a[i]
        j = i - 1
        while j >= 0 and a[j] > key:
            a[j + 1] = a[j]
            j -= 1
        a[j + 1] = key
    return a


def quickselect(a, k):
    while True:
        pivot = a[0]
        low = []
        high = []
        for x in a[1:]:
            if x < pivot:
                low.append(x)
            else:
                high.append(x)
        if k < len(low):
            a = low
        elif k == len(low):
            return pivot
        else:
            k -= len(low) + 1
            a = high


def median_by_counting(a):
    for i, x in enumerate(a):
        below = 0
        for j in range(len(a)):
            if j != i and a[j] < x:
                below += 1
        if below == len(a) // 2:
            return x
    return a[0]


def binary_search(a, x):
    lo, hi = 0, len(a)
    while lo < hi:
        mid = (lo + hi) // 2
        if a[mid] < x:
            lo = mid + 1
        else:
            hi = mid
    return lo


def levenshtein(s, t, tolerance):
    previous = [float(j) for j in range(len(t) + 1)]
    for i in range(1, len(s) + 1):
        current = [float(i)]
        for j in range(1, len(t) + 1):
            cost = 0.0 if abs(s[i - 1] - t[j - 1]) < tolerance else 1.0
            best = previous[j - 1] + cost
            if previous[j] + 1 < best:
                best = previous[j] + 1
            if current[j - 1] + 1 < best:
                best = current[j - 1] + 1
            current.append(best)
        previous = current
    return previous[-1]


EDGES = [(0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 4), (3, 5), (4, 5)]


def bellman_ford(costs):
    distance = [0.0, 100.0, 100.0, 100.0, 100.0, 100.0]
    for _ in range(5):
        for k, (u, v) in enumerate(EDGES):
            if distance[u] + costs[k] < distance[v]:
                distance[v] = distance[u] + costs[k]
    return distance


def thermostat(temperature, low, high):
    heating = False
    energy = 0.0
    for _ in range(12):
        if heating and temperature > high:
            heating = False
        elif not heating and temperature < low:
            heating = True
        if heating:
            temperature += 1.0
            energy += 1.0
        else:
            temperature -= 0.7
    return temperature, energy


def bouncing_ball(height, speed, restitution, steps=30):
    bounces = 0
    for _ in range(steps):
        speed -= 0.5
        height += 0.1 * speed
        if height < 0 and speed < 0:
            height = -height
            speed = -restitution * speed
            bounces += 1
    return height, speed, bounces


def tax(income, rate):
    if income <= 1.0:
        return 0.0
    if income <= 3.0:
        owed = rate * (income - 1.0)
    elif income <= 6.0:
        owed = rate * 2.0 + 2 * rate * (income - 3.0)
    else:
        owed = rate * 8.0 + 3 * rate * (income - 6.0)
    return owed if owed > 0.05 else 0.0


def tokens(signal, threshold):
    """Lengths of the runs above the threshold, one that is interrupted by a single sample counts as one."""
    state = "outside"
    count = 0
    length = 0.0
    for x in signal:
        if state == "outside":
            if x > threshold:
                state = "inside"
                count += 1
                length += x
        elif state == "inside":
            if x > threshold:
                length += x
            else:
                state = "gap"
        elif x > threshold:
            state = "inside"
            length += x
        else:
            state = "outside"
    return count, length


def newton_sqrt(x):
    y = 1.0
    while abs(y * y - x) > 1e-3:
        y = (y + x / y) / 2
    return y


def collatz(n):
    steps = 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    return steps


def life(board, steps):
    n, m = len(board), len(board[0])
    for _ in range(steps):
        new = [list(row) for row in board]
        for i in range(n):
            for j in range(m):
                around = -board[i][j]
                for di in (-1, 0, 1):
                    for dj in (-1, 0, 1):
                        around = around + board[(i + di) % n][(j + dj) % m]
                if 2.5 < around < 3.5:
                    new[i][j] = 1.0
                elif not 1.5 < around < 2.5:
                    new[i][j] = 0.0
        board = new
    return board


def hypotenuse(x, y):
    if y > 0:
        return math.sqrt(x * x + y * y)
    return x


def root_or_zero(x):
    if x > 0:
        return x**0.5
    return 0 * x
