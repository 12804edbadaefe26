# SPDX-License-Identifier: Apache-2.0
"""Gating as loops over tokens in Python floats: slow, and plain enough to be believed."""

import math


def softmax(row):
    top = max(row)
    parts = [math.exp(x - top) for x in row]
    return [p / sum(parts) for p in parts]


def ranked(row):
    return sorted(range(len(row)), key=lambda e: -row[e])


def route(logits, k, capacity, used=None, by_probability=False):
    """{(token, expert): (place, probability)} of what is kept, loss and counts.

    k = 1 and 2 queue all first choices, then all second ones; more queue token by token.
    """
    tokens, experts = len(logits), len(logits[0])
    gates = [softmax(row) for row in logits]
    used = used or [1] * tokens
    choices = [ranked(row)[:k] if used[t] else [] for t, row in enumerate(logits)]
    counts = [sum(e in c for c in choices) for e in range(experts)]
    if k == 2:
        order = [(t, choices[t][n]) for n in range(2) for t in range(tokens)]
    else:
        order = [(t, e) for t in range(tokens) for e in sorted(choices[t])]
    if by_probability:
        best = {
            e: set(sorted((t for t, x in order if x == e), key=lambda t: -gates[t][e])[:capacity])
            for e in range(experts)
        }
        order = [(t, e) for t, e in order if t in best[e]]
    kept, length = {}, [0] * experts
    for t, e in order:
        if length[e] < capacity:
            kept[t, e] = (length[e], gates[t][e])
        length[e] += 1
    loads = counts
    if k == 2:  # only first choices count for its loss
        loads = [sum(c[0] == e for c in choices) for e in range(experts)]
    share = k if k > 2 else 1
    loss = sum(sum(gates[t][e] for t in range(tokens)) / tokens * loads[e] for e in range(experts))
    return kept, loss / tokens * experts / share, counts


def normalised(kept):
    totals = {}
    for (t, _), (_, p) in kept.items():
        totals[t] = totals.get(t, 0.0) + p
    return {(t, e): (place, p / totals[t]) for (t, e), (place, p) in kept.items()}


def of_dense(combine):
    """The kept routes that a dense [S, E, C] combine tensor holds."""
    return {(t, e): (c, combine[t, e, c].item()) for t, e, c in (combine != 0).nonzero().tolist()}
