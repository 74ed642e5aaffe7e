"""Rules that look at a whole layer, or at the gradient in two places."""

import math
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from gpunet.core.params import around
from gpunet.errors import GpunetError
from gpunet.optim.optimizer import Count, Natural, Optimizer, Positive, Share, corrections

PART = 1 << 14  # elements that one block sums, of a matrix


@dataclass(eq=False)
class LARS(Optimizer):
    """v = momentum * v + lr * r * d, w -= v, r = trust * |w| / (|g| + weight_decay * |w|) of each matrix, else 1.

    You et al. 2017, https://arxiv.org/abs/1708.03888: for batches of thousands. Vectors, biases above all, move as
    with plain momentum. gradient and weights are whole layers', so a replica updates whole parameters.
    """

    lr: Natural = 1.0
    _: KW_ONLY
    momentum: Share = 0.9
    trust: Positive = 0.01
    weight_decay: Natural = 5e-4

    slots = ("velocity",)
    whole = True

    def tables(self, layout):
        """Return which parameters have a rate of their own."""
        return super().tables(layout) | {
            "scaled": np.array([len(p.shape) > 1 for p in layout.parameters.values()] or [0], np.int32)
        }

    def update(self, t, start, stop):
        """Trace the sums over layers, their rates, and SGD's launch with these."""
        n, rate, decay = stop - start, t.arena("weights.rate"), t.arena("weights.decay")
        w, g, table = (self.part(t, a, start, stop) for a in ("weights", "gradient", "weights.table"))
        sums, ratios = t.empty((n // 256, 2), t.wide), t.empty(rate.shape, t.wide)
        t.launch("layer_squares", w, g, t.arena("state"), sums, n)
        scaled = t.arena("weights.scaled")
        t.launch("lars_rates", sums, table, rate, decay, scaled, ratios, self.trust, rate.size, n)
        self.launch(t, start, stop, "sgd_update", self.momentum, 0, 1, rate=ratios)


@dataclass(eq=False)
class VSGD(Optimizer):
    """w -= lr * m^2 / (s * h) * g: means m of g, s of g^2, h of the curvature, over a memory that follows m^2 / s.

    memory = memory * (1 - m^2 / s) + 1. h, at least `floor`, is a finite difference: the mean of g times the change of
    the gradient of the same batch, with the same draws, from w to w + g, over s; a mean of quotients, as in the paper,
    would be that of the smallest g. scope: what has a rate of its own, every "weight", every parameter ("layer"), or
    "all" together; then m^2, s and s * h are sums over it, and h is the curvature along the gradient. caution
    multiplies the first s. A step takes two gradients and one batch. Schaul, Zhang and LeCun 2013,
    https://arxiv.org/abs/1206.1106, and Schaul and LeCun 2013, https://arxiv.org/abs/1301.3764.
    """

    lr: Natural = 1.0
    _: KW_ONLY
    scope: Literal["weight", "layer", "all"] = "layer"
    caution: Positive = 10.0
    floor: Positive = 0.1

    slots = ("mean", "square", "bend", "memory")
    probe = ("gradient", "shifted_gradient")
    radius = 0.0

    def __post_init__(self):
        super().__post_init__()
        for key in ("l1", "clip", "clip_value", "sam"):
            if getattr(self, key):
                raise GpunetError(
                    f"VSGD: {key}: expected 0, got {getattr(self, key)!r}: it measures the gradient itself"
                )

    @property
    def whole(self):
        """Whether sums over parameters are taken."""
        return self.scope != "weight" or self.max_norm > 0

    def update(self, t, start, stop):
        """Trace the averages, their sums over what shares a rate, and the step."""
        n, single = stop - start, int(self.scope == "weight")
        rate, state, rates = t.arena("weights.rate"), t.arena("state"), t.arena("rates")
        shifted = self.part(t, "shifted_gradient", start, stop)
        t.reduce_part(shifted)
        w, g, table = (self.part(t, a, start, stop) for a in ("weights", "gradient", "weights.table"))
        *averages, memory = (self.part(t, a, start, stop) for a in self.slots)
        sums, totals = t.empty((n // 256, 3), t.wide), t.empty((rate.size, 3), t.wide)
        t.launch("vsgd_averages", g, shifted, memory, state, *averages, sums, self.caution, n)
        t.launch("vsgd_fold", sums, table, totals, rate.size, n)
        if self.scope == "all":
            triples, totals = t.gather(totals), t.empty((rate.size, 3), t.wide)
            t.launch("vsgd_total", triples, totals, rate.size, triples.size // 3)
        columns = (table, rate, t.arena("weights.group"), rates, state)
        sizes = (rate.size, rates.size, n)
        t.launch("vsgd_update", w, g, *averages, memory, totals, *columns, self.floor, single, *sizes)


@dataclass(eq=False)
class Muon(Optimizer):
    """w -= lr * s * U V', U S V' the momentum of a matrix or kernel, by Newton-Schulz; the rest by adamw or sgd.

    v = momentum * v + g; of d = g + momentum * v (nesterov, else v) all singular values become about 1 in `steps`
    products of the polynomial 3.4445 x - 4.7750 x^3 + 2.0315 x^5; s = sqrt(max(1, columns / rows)), rows being what a
    unit reads. Decay is decoupled; it need not be where none of these decays. normalize: first w becomes as long as the
    root of its columns, which takes the place of decay; then s = 1. Vectors, and what `exclude` names (patterns, such
    as "head"), go by `rest` at rest_rate * lr, sgd with rest_momentum, and nesterov as set. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon.
    """

    lr: Natural = 0.02
    _: KW_ONLY
    momentum: Share = 0.95
    nesterov: bool = True
    steps: Count = 5
    normalize: bool = False
    exclude: list[str] = ()
    rest: Literal["adamw", "sgd"] = "adamw"
    rest_rate: Natural = 0.05
    rest_momentum: Share = 0.9
    beta1: Share = 0.9
    beta2: Share = 0.99
    eps: Positive = 1e-8
    weight_decay: Natural = 0.01
    decoupled: bool = True

    whole = True

    @property
    def slots(self):
        """The momentum, and what Adam keeps where that updates the rest."""
        return ("velocity", "mean", "square") if self.rest == "adamw" else ("velocity",)

    def tables(self, layout):
        """Return the rates of the rest; GpunetError where `exclude` matches nothing, or decay is set wrongly."""
        for pattern in self.exclude:
            if not any(pattern_matches(pattern, name) for name in layout.parameters):
                known = ", ".join(layout.parameters)
                raise GpunetError(f"Muon: exclude: '{pattern}' matches no weight that trains; known: {known}")
        decaying = [n for n, p in layout.parameters.items() if self.orthogonal(n, p) and p.decay * self.weight_decay]
        if decaying and not self.decoupled:
            raise GpunetError(
                "Muon: decoupled: expected True, got False: decay has no part in what is orthogonalized, such as "
                f"{decaying[0]}, unless its own factor of decay is 0"
            )
        return super().tables(layout) | {"rest_rate": layout.rows("rate", np.float64) * self.rest_rate}

    def orthogonal(self, name, p):
        """Return whether a weight is a matrix that this rule is for."""
        return len(p.shape) > 1 and not any(pattern_matches(pattern, name) for pattern in self.exclude)

    def update(self, t, start, stop):
        """Trace the matrices of one shape together, and a launch for each run of other weights."""
        shapes, rest = {}, []
        for row, (name, p) in enumerate(t.parameters().items()):
            first, last = t.place(name)
            if not start <= first < stop:
                continue
            if self.orthogonal(name, p):
                shapes.setdefault((p.size // p.shape[-1], p.shape[-1]), []).append((row, first, p.size))
            elif rest and rest[-1][1] == first:
                rest[-1][1] = last
            else:
                rest.append([first, last])
        for (rows, columns), places in shapes.items():
            self._trace_matrices(t, rows, columns, places)
        reads = (corrections(t, self.beta1, self.beta2),) if rest and self.rest == "adamw" else ()
        for first, last in rest:
            settings = {"rate": t.arena("weights.rest_rate")}
            if self.rest == "adamw":
                settings |= {"slots": ("mean", "square"), "reads": reads}
                self.launch(t, first, last, "adam_update", self.beta1, self.beta2, self.eps, **settings)
            else:
                momentum = (self.rest_momentum, int(self.nesterov), 0)
                self.launch(t, first, last, "sgd_update", *momentum, slots=("velocity",), **settings)

    def _trace_matrices(self, t, rows, columns, places):
        """Trace the update of matrices (rows, columns), each of (row in the tables, first element, size)."""
        n, count = rows * columns, len(places)
        parts, state, rates = -(-n // PART), t.arena("state"), t.arena("rates")
        x, norms = t.empty((count, rows, columns)), [t.empty((parts, 2), t.wide) for _ in places]
        flat = x.reshape(-1)
        for i, (_, first, _) in enumerate(places):
            w, g, v = (t.arena(a).slice(first, first + n) for a in ("weights", "gradient", "velocity"))
            direction = t.empty((n,), t.wide)
            t.launch("muon_momentum", w, g, v, state, direction, norms[i], self.momentum, int(self.nesterov), n, parts)
            t.launch("muon_normalize", direction, norms[i], flat.slice(i * n, (i + 1) * n), n, parts)
        flat = newton_schulz(t, x, int(self.steps)).reshape(-1)
        tables = [t.arena(f"weights.{c}") for c in ("rate", "decay", "group")]
        scale, length = math.sqrt(max(1, columns / rows)), 0.0
        if self.normalize:
            scale, length = 1.0, math.sqrt(columns)
        for i, (row, first, _) in enumerate(places):
            w, own = t.arena("weights").slice(first, first + n), flat.slice(i * n, (i + 1) * n)
            sizes = (row, tables[0].size, rates.size, n, parts)
            t.launch("muon_update", w, own, norms[i], *tables, rates, state, scale, length, *sizes)


def newton_schulz(t, x, steps):
    """Trace `steps` of X (a I + b A + c A A), A = X'X, for matrices x (count, rows, columns); return the last X.

    Where there are fewer rows than columns it is (a I + b A + c A A) X, A = XX', which is the same and smaller.
    """
    count, rows, columns = x.shape
    side = min(rows, columns)
    for _ in range(steps):
        turned = x.strided((count, columns, rows), (rows * columns, 1, columns))
        gram, square, product = t.empty((count, side, side)), t.empty((count, side, side)), t.empty(x.shape)
        t.matmul(*((turned, x) if columns <= rows else (x, turned)), gram)
        t.matmul(gram, gram, square)
        t.launch("muon_polynomial", square, gram, 3.4445, -4.7750, 2.0315, count, side)
        t.matmul(*((x, gram) if columns <= rows else (gram, x)), product)
        x = product
    return x


def pattern_matches(pattern, name):
    """Return whether a pattern stands for a parameter: its name, or that of a layer or block around it."""
    return any(fnmatchcase(outer, pattern) for outer in around(name))
