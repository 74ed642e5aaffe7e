"""Straight-line forms of the kernels of rules.cu and of what optim.cu has for them: one element after another.

ORACLES[kernel](name, **arguments in float64) returns {output: expected}; tests/test_twins.py holds the definitions to
them.
"""

import math

ORACLES = {}


def oracle(function):
    ORACLES[function.__name__] = function
    return function


def sign(x):
    return int(x > 0) - int(x < 0)


def rule(*slots):
    """Enter a function(x, d, lr, own, arguments) -> new x that moves one weight and its state, a dict by slot."""

    def enter(move):
        def every(name, **a):
            state, table = a["state"], a["table"]
            for i in range(a["n"] if state["apply"] else 0):
                row = table[i // 256]
                rate = a["rates"][min(int(state["update"]), a["steps"] - 1)]
                lr = rate * state["lr_scale"][a["group"][row]] * a["rate"][row]
                x, d = a["w"][i], a["g"][i] * state["gradient_scale"]
                if a["decoupled"]:
                    x -= lr * a["decay"][row] * x
                else:
                    d += a["decay"][row] * x
                own = {slot: a[slot][i] for slot in slots}
                a["w"][i] = move(x, d, lr, own, a)
                for slot in slots:
                    a[slot][i] = own[slot]
            return {"w": a["w"], **{slot: a[slot] for slot in slots}}

        ORACLES[move.__name__] = every
        return move

    return enter


@rule("square")
def adagrad_update(x, d, lr, own, a):
    own["square"] += d**2
    return x - lr / (math.sqrt(own["square"]) + a["eps"]) * d


@rule("total")
def window_update(x, d, lr, own, a):
    return x - lr / (math.sqrt(own["total"]) + a["eps"]) * d


@rule("square", "change")
def adadelta_update(x, d, lr, own, a):
    own["square"] += (1 - a["rho"]) * (d**2 - own["square"])
    step = math.sqrt((own["change"] + a["eps"]) / (own["square"] + a["eps"])) * d
    own["change"] += (1 - a["rho"]) * (step**2 - own["change"])
    return x - lr * step


@rule("square", "velocity", "mean")
def rmsprop_update(x, d, lr, own, a):
    own["square"] += (1 - a["alpha"]) * (d**2 - own["square"])
    spread = own["square"]
    if a["centered"]:
        own["mean"] = a["alpha"] * own["mean"] + (1 - a["alpha"]) * d
        spread = max(spread - own["mean"] ** 2, 0)
    own["velocity"] *= a["momentum"]
    own["velocity"] += d / math.sqrt(spread + a["eps"]) if a["inside"] else d / (math.sqrt(spread) + a["eps"])
    return x - lr * own["velocity"]


@rule("step", "before")
def rprop_update(x, d, lr, own, a):
    step = lr if a["state"]["update"] == 0 else own["step"]
    if d * own["before"] > 0:
        step *= a["up"]
    elif d * own["before"] < 0:
        step *= a["down"]
        d = 0
    own["step"] = step = min(max(step, a["low"]), a["high"])
    own["before"] = d
    return x - sign(d) * step


@rule("mean", "square")
def adam_update(x, d, lr, own, a):
    own["mean"] = a["beta1"] * own["mean"] + (1 - a["beta1"]) * d
    own["square"] = a["beta2"] * own["square"] + (1 - a["beta2"]) * d**2
    mean, square = own["mean"] / a["correction"][0], own["square"] / a["correction"][1]
    return x - lr * mean / (math.sqrt(square) + a["eps"])


@rule("velocity")
def sign_update(x, d, lr, own, a):
    own["velocity"] += (1 - a["momentum"]) * (d - own["velocity"])
    return x - lr * sign(own["velocity"])


@rule("mean")
def lion_update(x, d, lr, own, a):
    way = sign(a["beta1"] * own["mean"] + (1 - a["beta1"]) * d)
    own["mean"] += (1 - a["beta2"]) * (d - own["mean"])
    return x - lr * way


@rule("average")
def asgd_update(x, d, lr, own, a):
    update = int(a["state"]["update"])
    eta = lr * (1 + a["lambd"] * lr * update) ** -a["alpha"]
    x -= eta * (d + a["lambd"] * x) if not a["decoupled"] else eta * d + eta * a["lambd"] * x
    own["average"] += (x - own["average"]) / max(1, update - a["t0"])
    return x


@rule("fisher")
def fisher_update(x, d, lr, own, a):
    own["fisher"] += (1 - a["rho"]) * (int(a["state"]["count"]) * d**2 - own["fisher"])
    return x - lr * d / (own["fisher"] / a["correction"][0] + a["damping"])


@oracle
def gradient_adjust(name, w, g, table, l1, state, limit, rows, n):
    scale = float(state["gradient_scale"])
    for i in range(n if state["apply"] else 0):
        d = g[i] * scale
        d = max(-limit, min(limit, d)) if limit else d
        g[i] = (d + l1[table[i // 256]] * sign(w[i])) / scale
    return {"g": g}


@oracle
def window_square(name, w, g, square, total, table, decay, state, place, window, accumulate, decoupled, rows, n):
    for i in range(n if state["apply"] else 0):
        if int(state["update"]) % window == place:
            pull = 0 if decoupled else decay[table[i // 256]] * w[i]
            square[i] = (g[i] * state["gradient_scale"] + pull) ** 2
        total[i] = square[i] + (total[i] if accumulate else 0)
    return {"square": square, "total": total}


@oracle
def average_update(name, w, average, state, decay, start, every, n):
    steps = int(state["update"]) + 1
    if every == 0:
        new = 1 - min(decay, (steps + 1) / (steps + 10)) if steps > 1 else 1
    elif steps <= start + every:
        new = 1
    else:
        new = 0 if (steps - start) % every else 1 / ((steps - start) // every)
    for i in range(n if state["apply"] else 0):
        average[i] = (1 - new) * average[i] + new * w[i]
    return {"average": average}


@oracle
def max_norm_limit(name, w, state, limit, rows, c):
    for column in range(c if state["apply"] else 0):
        norm = math.sqrt(math.fsum(x * x for x in w[:, column]))
        if norm > limit:
            w[:, column] *= limit / norm
    return {"w": w}


@oracle
def penalty_sum(name, w, table, decay, l1, penalties, decoupled, rows, n, parts):
    penalties[:] = 0
    for i in range(n):
        row, x = table[i // 256], w[i]
        part = next(p for p in range(parts) if i < (p + 1) * n // parts)
        penalties[part] += (0 if decoupled else decay[row] / 2 * x * x) + l1[row] * abs(x)
    return {"penalties": penalties}


@oracle
def bias_correction(name, state, factors, beta1, beta2):
    steps = int(state["update"]) + 1
    return {"factors": [1 - math.pow(beta1, steps), 1 - math.pow(beta2, steps)]}


# optim.cu, layerwise.cu


@oracle
def probe_shift(name, w, g, norms, sums, state, probe, radius, n, parts):
    norm = math.sqrt(math.fsum(norms))
    for i in range(n):
        if radius:
            probe[i] = w[i] + (radius * g[i] / norm if norm else 0)
        else:
            probe[i] = w[i] + g[i] / sums[2] / state["loss_scale"]
    return {"probe": probe}


@oracle
def layer_squares(name, w, g, state, sums, n):
    for b in range(n // 256):
        block = slice(b * 256, (b + 1) * 256)
        sums[b] = math.fsum(x * x for x in w[block]), math.fsum((d * state["gradient_scale"]) ** 2 for d in g[block])
    return {"sums": sums}


@oracle
def lars_rates(name, sums, table, rate, decay, scaled, ratios, trust, rows, n):
    for row in range(rows):
        weights = math.sqrt(sum(sums[b, 0] for b in range(n // 256) if table[b] == row))
        gradient = math.sqrt(sum(sums[b, 1] for b in range(n // 256) if table[b] == row))
        ratios[row] = rate[row]
        if scaled[row] and weights and gradient:
            ratios[row] *= trust * weights / (gradient + decay[row] * weights)
    return {"ratios": ratios}


@oracle
def vsgd_averages(name, g, shifted, memory, state, mean, square, bend, sums, caution, n):
    scale = state["gradient_scale"]
    for i in range(n if state["apply"] else 0):
        d, e = g[i] * scale, shifted[i] * scale - g[i] * scale
        if state["update"] == 0:
            mean[i], square[i], bend[i] = d, caution * d**2, caution * d * e
        else:
            new = 1 / max(memory[i], 1)
            mean[i] = (1 - new) * mean[i] + new * d
            square[i] = (1 - new) * square[i] + new * d**2
            bend[i] = (1 - new) * bend[i] + new * d * e
    for b in range(n // 256):
        block = slice(b * 256, (b + 1) * 256)
        sums[b] = math.fsum(m * m for m in mean[block]), math.fsum(square[block]), math.fsum(bend[block])
    return {"mean": mean, "square": square, "bend": bend, "sums": sums}


@oracle
def vsgd_fold(name, sums, table, totals, rows, n):
    totals[:] = 0
    for b in range(n // 256):
        totals[table[b]] += sums[b]
    return {"totals": totals}


@oracle
def vsgd_total(name, triples, total, rows, m):
    total[:] = [math.fsum(triples[:, k]) for k in range(3)]
    return {"total": total}


@oracle
def vsgd_update(
    name, w, g, mean, square, bend, memory, totals, table, rate, group, rates, state, floor, single, rows, steps, n
):
    for i in range(n if state["apply"] else 0):
        row = table[i // 256]
        lr = rates[min(int(state["update"]), steps - 1)] * state["lr_scale"][group[row]] * rate[row]
        a, v, b = (mean[i] ** 2, square[i], bend[i]) if single else totals[row]
        if v:
            w[i] -= lr * a / max(b, floor * v) * g[i] * state["gradient_scale"]
        if state["update"] == 0:
            memory[i] = 2
        elif v:
            memory[i] = (1 - a / v) * memory[i] + 1
    return {"w": w, "memory": memory}


@oracle
def muon_momentum(name, w, g, velocity, state, direction, norms, momentum, nesterov, n, parts):
    direction[:], norms[:] = 0, 0
    for i in range(n):
        if state["apply"]:
            d = g[i] * state["gradient_scale"]
            velocity[i] = momentum * velocity[i] + d
            direction[i] = momentum * velocity[i] + d if nesterov else velocity[i]
        part = next(p for p in range(parts) if i < (p + 1) * n // parts)
        norms[part] += direction[i] ** 2, w[i] ** 2
    return {"velocity": velocity, "direction": direction, "norms": norms}


@oracle
def muon_normalize(name, direction, norms, x, n, parts):
    return {"x": [d / max(math.sqrt(math.fsum(norms[:, 0])), 1e-7) for d in direction]}


@oracle
def muon_polynomial(name, z, y, a, b, c, matrices, side):
    for m in range(matrices):
        for i in range(side):
            for j in range(side):
                y[m, i, j] = b * y[m, i, j] + c * z[m, i, j] + (a if i == j else 0)
    return {"y": y}


@oracle
def muon_update(name, w, x, norms, rate, decay, group, rates, state, scale, length, row, rows, steps, n, parts):
    lr = rates[min(int(state["update"]), steps - 1)] * state["lr_scale"][group[row]] * rate[row]
    size = math.sqrt(math.fsum(norms[:, 1]))
    for i in range(n if state["apply"] else 0):
        w[i] = (w[i] * length / size if length else w[i] - lr * decay[row] * w[i]) - lr * scale * x[i]
    return {"w": w}
