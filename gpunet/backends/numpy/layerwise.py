"""Definitions of kernels/layerwise.cu: rules that look at a whole layer. Arenas and tables as in rules.py.

With state.apply 0 weights and what a rule keeps stay as they are; d = gradient_scale * g.
"""

import numpy as np

from gpunet.backends.numpy.values import wide

UNIT = 256


def layer_squares(w, g, state, sums, n):
    """sums[b] = sum of w^2 and sum of d^2 over block b."""
    d = g.reshape(-1, UNIT) * float(state["gradient_scale"])
    sums.reshape(-1, 2)[:] = np.stack([np.square(a).sum(axis=1) for a in (w.reshape(-1, UNIT), d)], axis=1)


def lars_rates(sums, table, rate, decay, scaled, ratios, trust, rows, n):
    """ratios = rate * trust * |w| / (|d| + decay * |w|) of each row; rate where a norm is 0 or scaled is 0."""
    table, ratios = table.reshape(-1), ratios.reshape(rows)
    lengths = np.stack([np.sqrt(sums.reshape(-1, 2)[table == row].sum(axis=0)) for row in range(rows)])
    weights, directions = lengths.T
    known = (scaled.reshape(rows) != 0) & (weights > 0) & (directions > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        local = trust * weights / (directions + decay.reshape(rows) * weights)
    ratios[:] = rate.reshape(rows) * np.where(known, local, 1)


def vsgd_averages(g, shifted, memory, state, mean, square, bend, sums, caution, n):
    """mean, square and bend follow d, d^2 and d * e by 1 / memory, e = (shifted - g) * gradient_scale.

    Update 0: they are d, caution * d^2 and caution * d * e. sums[b]: of mean^2, square and bend over block b.
    """
    mean, square, bend = (a.reshape(n) for a in (mean, square, bend))
    if state["apply"]:
        scale, g = float(state["gradient_scale"]), g.reshape(n)
        d, e = g * scale, (shifted.reshape(n) - g) * scale
        if state["update"] == 0:
            mean[:], square[:], bend[:] = d, caution * d * d, caution * d * e
        else:
            for average, value in ((mean, d), (square, d * d), (bend, d * e)):
                average += (value - average) / np.maximum(memory.reshape(n), 1)
    quantities = (np.square(mean), square, bend)
    sums.reshape(-1, 3)[:] = np.stack([q.reshape(-1, UNIT).sum(axis=1) for q in quantities], axis=1)


def vsgd_fold(sums, table, totals, rows, n):
    """totals[row] = the sum of the triples of its blocks."""
    table, sums = table.reshape(-1), sums.reshape(-1, 3)
    for row in range(rows):
        totals.reshape(rows, 3)[row] = sums[table == row].sum(axis=0)


def vsgd_total(triples, total, rows, m):
    """Every row of total = the sum of m triples."""
    total.reshape(rows, 3)[:] = triples.reshape(m, 3).sum(axis=0)


def vsgd_update(
    w, g, mean, square, bend, memory, totals, table, rate, group, rates, state, floor, single, rows, steps, n
):
    """w -= lr * a / max(b, floor * v) * d; memory = memory * (1 - a / v) + 1, 2 at update 0; neither where v = 0.

    a, v, b: totals of the row, or where single is 1 mean^2, square and bend of the weight.
    """
    if not state["apply"]:
        return
    w, memory, table = w.reshape(-1, UNIT), memory.reshape(-1, UNIT), table.reshape(-1)
    if single:
        a, v, b = (q.reshape(-1, UNIT) for q in (np.square(mean), square, bend))
    else:
        a, v, b = (totals.reshape(rows, 3)[table, k, None] for k in range(3))
    lr_scale = state["lr_scale"].astype(w.dtype)[group.reshape(rows)]
    now = rates.reshape(steps)[min(int(state["update"]), steps - 1)]
    lr = (now * lr_scale * rate.reshape(rows))[table, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        share, eta = (np.where(v > 0, a / q, 0) for q in (v, np.maximum(b, floor * v)))
    w -= lr * eta * (g.reshape(-1, UNIT) * float(state["gradient_scale"]))
    if state["update"] == 0:
        memory[:] = 2
    else:
        memory[:] = np.where(v > 0, memory * (1 - share) + 1, memory)


def muon_momentum(w, g, velocity, state, direction, norms, momentum, nesterov, n, parts):
    """v = momentum * v + d; direction = nesterov ? d + momentum * v : v, 0 where apply is 0.

    norms[p] = sum of direction^2 and sum of w^2 over part p.
    """
    v, u = velocity.reshape(n), direction.reshape(n)
    u[:] = 0
    if state["apply"]:
        d = g.reshape(n) * float(state["gradient_scale"])
        v[:] = momentum * v + d
        u[:] = d + momentum * v if nesterov else v
    for p in range(parts):
        part = slice(p * n // parts, (p + 1) * n // parts)
        norms.reshape(parts, 2)[p] = np.square(u[part]).sum(), np.square(w.reshape(n)[part]).sum()


def muon_normalize(direction, norms, x, n, parts):
    """x = direction / max(|direction|, 1e-7)."""
    x.reshape(n)[:] = direction.reshape(n) / max(np.sqrt(norms.reshape(parts, 2)[:, 0].sum()), 1e-7)


def muon_polynomial(z, y, a, b, c, matrices, side):
    """y = a * I + b * y + c * z, of each matrix."""
    y, z = (m.reshape(matrices, side, side) for m in (y, z))
    y[:] = b * wide(y) + c * wide(z) + a * np.eye(side, dtype=wide(y[:0]).dtype)


def muon_update(w, x, norms, rate, decay, group, rates, state, scale, length, row, rows, steps, n, parts):
    """w = w * shrink - lr * scale * x; shrink = 1 - lr * decay[row], or length / |w| where length > 0."""
    if not state["apply"]:
        return
    now = rates.reshape(steps)[min(int(state["update"]), steps - 1)]
    lr = now * w.dtype.type(state["lr_scale"][group.reshape(rows)[row]]) * rate.reshape(rows)[row]
    size = np.sqrt(norms.reshape(parts, 2)[:, 1].sum())
    shrink = length / size if length > 0 and size > 0 else 1 - lr * decay.reshape(rows)[row]
    w.reshape(n)[:] = w.reshape(n) * shrink - lr * scale * wide(x).reshape(n)
