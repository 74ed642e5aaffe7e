"""What all update rules share: settings and their limits, the launch over the flat arenas, what goes around a rule.

A rule is a dataclass of settings with `slots`, the arenas it keeps beside the weights, and `update`, which traces its
launches. Annotations are limits: of arguments here, of keys in [optimizer] of a recipe.
"""

from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import Annotated, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from gpunet.core.params import BLOCK
from gpunet.errors import GpunetError

Natural = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Lt(1)]
Count = Annotated[int, Ge(1)]


@dataclass(eq=False)
class Optimizer:
    """w moves against the gradient of the mean loss, plus weight_decay * w, plus l1 * sign(w): what all rules share.

    lr: the rate where no schedule gives it. decoupled: weight_decay is no part of the gradient; instead w *= 1 - lr *
    weight_decay before the rule. clip: the largest norm of the whole gradient; clip_value: of each of its numbers,
    after that; max_norm: of a unit's incoming weights, after the update (Srivastava et al. 2014); each 0 for none.
    sam: how far to climb along the gradient before the one that the rule gets is taken, on the same batch (Foret et al.
    2021, https://arxiv.org/abs/2010.01412); 0 for not at all. With accumulate each batch climbs from where the weights
    are.
    """

    lr: Natural = 0.01
    _: KW_ONLY
    l1: Natural = 0.0
    decoupled: bool = False
    clip: Natural = 0.0
    clip_value: Natural = 0.0
    max_norm: Natural = 0.0
    sam: Natural = 0.0

    slots = ()
    weight_decay = 0.0

    def __post_init__(self):
        for f in fields(self):
            if fault := misfit(getattr(self, f.name), f.type):
                raise GpunetError(f"{type(self).__name__}: {f.name}: {fault}")

    @property
    def whole(self):
        """Whether a replica updates whole parameters, as what sums over one needs, and not just an even part."""
        return self.max_norm > 0

    @property
    def probe(self):
        """Where the gradients go, if a second one is taken at arena "probe": (first, second), else None."""
        return ("first_gradient", "gradient") if self.sam else None

    @property
    def radius(self):
        """The length of the way to there, or 0 for the gradient of the mean loss as it is."""
        return self.sam

    @property
    def penalised(self):
        """Whether L2 or L1 add to the loss."""
        return self.l1 > 0 or (self.weight_decay > 0 and not self.decoupled)

    def tables(self, layout):
        """Return {name: values} of what the update wants to know of each parameter: arenas weights.<name>."""
        return {"l1": layout.rows("decay", float) * self.l1} if self.penalised or self.clip_value else {}

    def trace(self, t, start, stop):
        """Trace the update of weights `start` to `stop` of the arena."""
        if self.l1 or self.clip_value:
            arenas = (self.part(t, a, start, stop) for a in ("weights", "gradient", "weights.table"))
            l1 = t.arena("weights.l1")
            t.launch("gradient_adjust", *arenas, l1, t.arena("state"), self.clip_value, l1.size, stop - start)
        self.update(t, start, stop)
        if self.max_norm:
            for name, p in t.parameters().items():
                if len(p.shape) > 1 and start <= t.place(name)[0] < stop:
                    w, columns = t.weight(p), p.shape[-1]
                    with t.at(name):
                        t.launch("max_norm_limit", w, t.arena("state"), self.max_norm, p.size // columns, columns)

    def update(self, t, start, stop):
        """Trace the rule itself."""
        raise NotImplementedError

    def part(self, t, name, start, stop):
        """Return the part of an arena, or of the block table, that belongs to weights `start` to `stop`."""
        unit = BLOCK if name == "weights.table" else 1
        return t.arena(name).slice(start // unit, stop // unit)

    def launch(self, t, start, stop, kernel, *settings, slots=None, reads=(), rate=None):
        """Trace a launch of one of the kernels for these weights; `reads` are tensors of its own, `rate` a table."""
        arenas = [self.part(t, a, start, stop) for a in ("weights", "gradient")]
        arenas += [self.part(t, a, start, stop) if isinstance(a, str) else a for a in slots or self.slots]
        columns = [rate or t.arena("weights.rate"), t.arena("weights.decay"), t.arena("weights.group")]
        rates = t.arena("rates")
        t.launch(
            kernel,
            *arenas,
            self.part(t, "weights.table", start, stop),
            *columns,
            rates,
            t.arena("state"),
            *reads,
            *settings,
            int(self.decoupled),
            columns[0].size,
            rates.size,
            stop - start,
        )


def corrections(t, beta1, beta2=0.0):
    """Trace 1 - beta^t for two factors, t the number of the update; return the two numbers as a tensor."""
    factors = t.empty((2,), t.wide)
    t.launch("bias_correction", t.arena("state"), factors, beta1, beta2)
    return factors


LIMITS = {
    Ge: (lambda value, limit: value >= limit.ge, lambda limit: f"{limit.ge:g} or more"),
    Gt: (lambda value, limit: value > limit.gt, lambda limit: f"a number above {limit.gt:g}"),
    Le: (lambda value, limit: value <= limit.le, lambda limit: f"{limit.le:g} or less"),
    Lt: (lambda value, limit: value < limit.lt, lambda limit: f"a number below {limit.lt:g}"),
}


def misfit(value, annotation):
    """Return "expected ..., got ..." where a value is not what an annotation allows, else nothing."""
    kind, *limits = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    expected = None
    if get_origin(kind) is Literal:
        expected = None if value in get_args(kind) else " or ".join(map(repr, get_args(kind)))
    elif kind is bool:
        expected = None if value in (False, True) else "True or False"
    elif kind in (int, float):
        whole = kind is int
        if not isinstance(value, Real) or isinstance(value, bool) or (whole and value % 1):
            expected = "a whole number" if whole else "a number"
        elif not abs(value) < float("inf"):
            expected = "a finite number"
        for limit in limits if expected is None else ():
            holds, words = LIMITS[type(limit)]
            expected = expected or (None if holds(value, limit) else words(limit))
    elif get_origin(kind) is list:
        if not isinstance(value, list | tuple) or any(misfit(v, get_args(kind)[0]) for v in value):
            expected = "a list of texts" if get_args(kind)[0] is str else "a list"
    elif kind is str and not isinstance(value, str):
        expected = "a text"
    return f"expected {expected}, got {value!r}" if expected else None
