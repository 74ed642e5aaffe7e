"""Definitions of kernels/optim.cu: from a sum of gradients to new weights, for whole arenas.

An arena is blocks of 256 elements; table[b] is the row, in a parameter's multipliers, of block b.
"""

import numpy as np

GOOD_STEPS = 2000  # finite steps after which a dynamic loss scale doubles


def gradient_norm(g, norms, n, parts):
    """norms[p] = sum of g*g in double over the elements p*n//parts .. (p+1)*n//parts."""
    for p in range(parts):
        part = g.reshape(n)[p * n // parts : (p + 1) * n // parts].astype(np.float64)
        with np.errstate(over="ignore"):
            norms.reshape(parts)[p] = np.square(part).sum()


def penalty_sum(w, table, decay, l1, penalties, decoupled, rows, n, parts):
    """penalties[p] = sum of decay[row] / 2 * w^2 (decoupled: 0) + l1[row] * |w| in double over part p."""
    x, row = w.reshape(n).astype(np.float64), np.repeat(table.reshape(-1), 256)
    with np.errstate(over="ignore"):
        terms = l1.reshape(rows)[row] * np.abs(x)
        if not decoupled:
            terms += decay.reshape(rows)[row] / 2 * np.square(x)
    for p in range(parts):
        penalties.reshape(parts)[p] = terms[p * n // parts : (p + 1) * n // parts].sum()


def bias_correction(state, factors, beta1, beta2):
    """factors[k] = 1 - beta_k^(update + 1), the power by squaring, in double: so it has the same bits everywhere."""
    for k, base in enumerate((beta1, beta2)):
        power, t = 1.0, int(state["update"]) + 1
        while t:
            power, base, t = power * base if t % 2 else power, base * base, t // 2
        factors.reshape(2)[k] = 1 - power


def gradient_finish(norms, penalties, sums, rates, table, state, clip, dynamic, parts, terms, steps, rows):
    """norm = sqrt(sum of norms) / (count * loss_scale), count = sums[2]: writes state and a row of the table.

    If norm and the loss sums[0] are finite and halt < 0: apply = 1, gradient_scale = min(1, clip / norm) / (count *
    loss_scale) (clip 0: no min), good += 1, and where dynamic, GOOD_STEPS good steps double loss_scale.
    If not: apply = good = 0, gradient_scale stays; and unless halt was set before, loss_scale halves, to no
    less than 1, where dynamic and above 1, else halt = state.batch. state.count = count. Row update % rows:
    loss / count, hits / count, count, norm, rate of group 0, gradient_scale, sum of penalties, 1 applied, 0 skipped
    or -1 halted, batch, update + 1.
    """
    loss, hits, count, _ = sums.reshape(4)
    loss_scale = float(state["loss_scale"])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        norm = np.sqrt(norms.reshape(parts).sum()) / (count * loss_scale)
        mean_loss, accuracy = loss / count, hits / count
        clipped = min(1, clip / norm) if clip else 1
    apply = np.isfinite(norm) and np.isfinite(loss) and state["halt"] < 0
    state["apply"], state["count"] = apply, count
    state["good"] = state["good"] + 1 if apply else 0
    if apply:
        state["gradient_scale"] = clipped / (count * loss_scale)
        if dynamic and state["good"] >= GOOD_STEPS:
            state["loss_scale"], state["good"] = loss_scale * 2, 0
    elif state["halt"] < 0:
        if dynamic and loss_scale > 1:
            state["loss_scale"] = max(loss_scale / 2, 1)
        else:
            state["halt"] = state["batch"]
    rate = float(_rate(rates, state, steps)) * state["lr_scale"][0]
    verdict, update = apply if state["halt"] < 0 else -1, int(state["update"])
    penalty = penalties.reshape(terms).sum()
    row = mean_loss, accuracy, count, norm, rate, state["gradient_scale"], penalty, verdict, state["batch"], update + 1
    table.reshape(rows, 10)[update % rows] = row


def probe_shift(w, g, norms, sums, state, probe, radius, n, parts):
    """probe = w + radius * g / |g|, |g| the root of the sum of norms (0: w); radius 0: w + g / (count * loss_scale)."""
    norm = np.sqrt(norms.reshape(parts).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        far = radius / norm if radius else 1 / (sums.reshape(4)[2] * float(state["loss_scale"]))
    probe.reshape(n)[:] = w.reshape(n) + w.dtype.type(far if norm or not radius else 0) * g.reshape(n)


def sgd_update(
    w, g, velocity, table, rate, decay, group, rates, state, momentum, nesterov, caffe, decoupled, rows, steps, n
):
    """v = momentum * v + d; w -= lr * (nesterov ? d + momentum * v : v).

    d = gradient_scale * g + decay[row] * w, lr = rates[update] * lr_scale[group[row]] * rate[row]; decoupled:
    d = gradient_scale * g, and w *= 1 - lr * decay[row] comes first.
    With caffe the velocity holds lr, so that a new rate reaches new steps only:
    v' = momentum * v + lr * d; w -= nesterov ? (1 + momentum) * v' - momentum * v : v'.
    Nothing happens if state.apply is 0.
    """
    if not state["apply"]:
        return
    w, g, velocity = (a.reshape(n // 256, 256) for a in (w, g, velocity))
    table = table.reshape(-1)
    lr_scale = state["lr_scale"].astype(w.dtype)[group.reshape(rows)]
    lr = (_rate(rates, state, steps) * lr_scale * rate.reshape(rows))[table, None]
    d = float(state["gradient_scale"]) * g
    if decoupled:
        w *= 1 - lr * decay.reshape(rows)[table, None]
    else:
        d += decay.reshape(rows)[table, None] * w
    if caffe:
        v = momentum * velocity + lr * d
        w -= (1 + momentum) * v - momentum * velocity if nesterov else v
    else:
        v = momentum * velocity + d
        w -= lr * (d + momentum * v if nesterov else v)
    velocity[:] = v


def statistics_update(running, batch, table, momentum, sums, state, rows, n):
    """running += momentum[row] * (batch / sums[3] - running); nothing happens if state.apply is 0."""
    if not state["apply"]:
        return
    running, batch = running.reshape(n // 256, 256), batch.reshape(n // 256, 256)
    share = momentum.reshape(rows)[table.reshape(-1), None]
    running += share * (batch / float(sums.reshape(4)[3]) - running)


def state_update(state):
    """update += apply."""
    state["update"] += state["apply"]


def state_advance(state, batches):
    """batch += 1; epoch = batch // batches."""
    state["batch"] += 1
    state["epoch"] = state["batch"] // batches


def _rate(rates, state, steps):
    """The schedule at this update; its last entry holds on."""
    return rates.reshape(steps)[min(int(state["update"]), steps - 1)]
