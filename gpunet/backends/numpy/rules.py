"""Definitions of kernels/rules.cu: update rules over whole arenas.

An arena is blocks of 256 elements; table[b] is the row, in a parameter's multipliers, of block b. With state.apply 0
nothing happens. Of each element: t = update + 1, lr = rates[update] * lr_scale[group[row]] * rate[row], and
d = gradient_scale * g + decay[row] * w; decoupled: d = gradient_scale * g, and w *= 1 - lr * decay[row] comes first.
"""

import numpy as np

UNIT = 256


def gradient_adjust(w, g, table, l1, state, limit, rows, n):
    """g = (clip(gradient_scale * g, -limit, limit) + l1[row] * sign(w)) / gradient_scale; limit 0: no clip."""
    if not state["apply"]:
        return
    (w, g), scale = _units(w, g), float(state["gradient_scale"])
    d = g * scale
    if limit:
        d = np.clip(d, -limit, limit)
    g[:] = (d + l1.reshape(rows)[table.reshape(-1), None] * np.sign(w)) / scale


def adagrad_update(w, g, square, table, rate, decay, group, rates, state, eps, decoupled, rows, steps, n):
    """s += d^2; w -= lr * d / (sqrt(s) + eps)."""
    if not state["apply"]:
        return
    w, d, lr, square = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, square)
    square += d * d
    w -= lr * d / (np.sqrt(square) + eps)


def window_square(w, g, square, total, table, decay, state, place, window, accumulate, decoupled, rows, n):
    """square = d^2 where update % window == place; total = square, or total += square where accumulate."""
    if not state["apply"]:
        return
    w, g, square, total = _units(w, g, square, total)
    if int(state["update"]) % window == place:
        shrink = 0 if decoupled else decay.reshape(rows)[table.reshape(-1), None]
        square[:] = np.square(float(state["gradient_scale"]) * g + shrink * w)
    total[:] = total + square if accumulate else square


def window_update(w, g, total, table, rate, decay, group, rates, state, eps, decoupled, rows, steps, n):
    """w -= lr * d / (sqrt(total) + eps)."""
    if not state["apply"]:
        return
    w, d, lr, total = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, total)
    w -= lr * d / (np.sqrt(total) + eps)


def adadelta_update(w, g, square, change, table, rate, decay, group, rates, state, rho, eps, decoupled, rows, steps, n):
    """s = rho * s + (1 - rho) * d^2; u = d * sqrt(a + eps) / sqrt(s + eps); a = rho * a + (1 - rho) * u^2; w -= lr * u.

    square is s, change is a.
    """
    if not state["apply"]:
        return
    w, d, lr, square, change = _rule(
        w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, square, change
    )
    square[:] = rho * square + (1 - rho) * d * d
    u = d * (np.sqrt(change + eps) / np.sqrt(square + eps))
    change[:] = rho * change + (1 - rho) * u * u
    w -= lr * u


def rmsprop_update(
    w, g, square, velocity, mean, table, rate, decay, group, rates, state, alpha, eps, momentum, centered, inside,
    decoupled, rows, steps, n,
):  # fmt: skip
    """s = alpha * s + (1 - alpha) * d^2; v = momentum * v + d / (sqrt(r) + eps); w -= lr * v.

    inside: d / sqrt(r + eps); r = s, or where centered: m += (1 - alpha) * (d - m), r = max(s - m^2, 0).
    """
    if not state["apply"]:
        return
    w, d, lr, square, velocity, mean = _rule(
        w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, square, velocity, mean
    )
    square[:] = alpha * square + (1 - alpha) * d * d
    spread = square
    if centered:
        mean += (1 - alpha) * (d - mean)
        spread = np.maximum(square - mean * mean, 0)
    velocity[:] = momentum * velocity + d / (np.sqrt(spread + eps) if inside else np.sqrt(spread) + eps)
    w -= lr * velocity


def rprop_update(
    w, g, step, before, table, rate, decay, group, rates, state, up, down, low, high, decoupled, rows, steps, n
):
    """w -= sign(d) * step; step *= up where d * before > 0, down where it is < 0, then within low .. high.

    There d = 0 for this update and the next one's `before`; update 0 begins with step = lr.
    """
    if not state["apply"]:
        return
    w, d, lr, step, before = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, step, before)
    if state["update"] == 0:
        step[:] = lr
    turn = d * before
    step[:] = np.clip(step * np.where(turn > 0, up, np.where(turn < 0, down, 1)), low, high)
    before[:] = np.where(turn < 0, 0, d)
    w -= np.sign(before) * step


def adam_update(
    w, g, mean, square, table, rate, decay, group, rates, state, correction, beta1, beta2, eps, decoupled, rows,
    steps, n,
):  # fmt: skip
    """w -= lr / correction[0] * m / (sqrt(v) / sqrt(correction[1]) + eps).

    m += (1 - beta1) * (d - m); v = beta2 * v + (1 - beta2) * d^2.
    """
    if not state["apply"]:
        return
    w, d, lr, mean, square = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, mean, square)
    first, second = correction.reshape(2)
    mean += (1 - beta1) * (d - mean)
    square[:] = beta2 * square + (1 - beta2) * d * d
    w -= lr / first * (mean / (np.sqrt(square) / np.sqrt(second) + eps))


def sign_update(w, g, velocity, table, rate, decay, group, rates, state, momentum, decoupled, rows, steps, n):
    """v = momentum * v + (1 - momentum) * d; w -= lr * sign(v)."""
    if not state["apply"]:
        return
    w, d, lr, velocity = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, velocity)
    velocity[:] = momentum * velocity + (1 - momentum) * d
    w -= lr * np.sign(velocity)


def lion_update(w, g, mean, table, rate, decay, group, rates, state, beta1, beta2, decoupled, rows, steps, n):
    """w -= lr * sign(beta1 * m + (1 - beta1) * d); m = beta2 * m + (1 - beta2) * d."""
    if not state["apply"]:
        return
    w, d, lr, mean = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, mean)
    w -= lr * np.sign(beta1 * mean + (1 - beta1) * d)
    mean[:] = beta2 * mean + (1 - beta2) * d


def asgd_update(w, g, average, table, rate, decay, group, rates, state, lambd, alpha, t0, decoupled, rows, steps, n):
    """w -= eta * (d + lambd * w), eta = lr / (1 + lambd * lr * update)^alpha; a += (w - a) / max(1, update - t0)."""
    if not state["apply"]:
        return
    w, d, lr, average = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, average)
    update = int(state["update"])
    eta = lr / (1 + lambd * lr * update) ** alpha
    w[:] = w * (1 - lambd * eta) - eta * d
    average[:] = w if update <= t0 + 1 else average + (w - average) / (update - t0)


def fisher_update(
    w, g, fisher, table, rate, decay, group, rates, state, correction, rho, damping, decoupled, rows, steps, n
):
    """f = rho * f + (1 - rho) * count * d^2; w -= lr * d / (f / correction[0] + damping)."""
    if not state["apply"]:
        return
    w, d, lr, fisher = _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, fisher)
    fisher[:] = rho * fisher + (1 - rho) * int(state["count"]) * d * d
    w -= lr * d / (fisher / correction.reshape(2)[0] + damping)


def average_update(w, average, state, decay, start, every, n):
    """average += share * (w - average), t = update + 1.

    every 0: share = 1 - min(decay, (t + 1) / (t + 10)), 1 at update 0. Else with k = (t - start) / every: 1 where k <=
    1, 1 / k where that is whole, 0 between.
    """
    if not state["apply"]:
        return
    w, average, t, share = w.reshape(n), average.reshape(n), int(state["update"]) + 1, 1
    if every == 0 and t > 1:
        share = 1 - min(decay, (t + 1) / (t + 10))
    elif every and t - start > every:
        share = every / (t - start) if (t - start) % every == 0 else 0
    average[:] = w if share == 1 else average + share * (w - average)


def max_norm_limit(w, state, limit, rows, c):
    """A column of w whose norm is above `limit` is scaled to it."""
    if not state["apply"]:
        return
    w = w.reshape(rows, c)
    norms = np.sqrt(np.square(w).sum(axis=0))
    w *= np.where(norms > limit, limit / np.maximum(norms, limit), 1)


def _units(*arrays):
    """Return arenas as rows of 256 elements."""
    return [a.reshape(-1, UNIT) for a in arrays]


def _rule(w, g, table, rate, decay, group, rates, state, decoupled, rows, steps, *slots):
    """Return w (decayed, if decoupled), d, the column of rates, and the slots: what all rules begin with."""
    w, g, *slots = _units(w, g, *slots)
    table = table.reshape(-1)
    now = rates.reshape(steps)[min(int(state["update"]), steps - 1)]
    lr_scale = state["lr_scale"].astype(w.dtype)[group.reshape(rows)]
    lr, shrink = (now * lr_scale * rate.reshape(rows))[table, None], decay.reshape(rows)[table, None]
    d = float(state["gradient_scale"]) * g
    if decoupled:
        w *= 1 - lr * shrink
    else:
        d += shrink * w
    return w, d, lr, *slots
