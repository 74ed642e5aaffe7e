"""What to say of a run that met a value that is not finite: where it began, what was finite, and what to try.

The batch is computed once more under gpunet.core.observe.CheckFinite, through the public Step; no weight is changed.
"""

import numpy as np

from gpunet.core.observe import CheckFinite, unfinite
from gpunet.core.trace import Share
from gpunet.errors import GpunetError

SHOWN = 3  # updates before the fault, and tensors that are not finite, that are told
ROSE = 10  # times by which a gradient norm is called larger than it was


def explain(step, config, rows, folder):
    """Return why a step halted, or has weights that are not finite: a line, and lines of what is known.

    rows: the metrics so far. folder: the run directory, which is named, and looked at for checkpoints.
    """
    state = step.state
    halted = state["halt"] >= 0
    batch = int(state["halt"] if halted else max(state["batch"] - 1, 0))
    slots = {slot: kept.copy() for slot, kept in step.optimizer_state.items()}
    broken = not_finite(step.weights.copy(), step.statistics.copy(), slots)
    rate = step.rates[min(int(state["update"]), len(step.rates) - 1)]
    first = batch - batch % step.batches % config.train.batches_an_update(step.batches)
    fault, loss = _look_again(step, first, batch - first + 1)
    rows = [row for row in rows if row["split"] == "train"][-SHOWN:]
    what = "loss or gradient is not finite" if halted else "weights are not finite"
    scale = f"{'the smallest loss scale,' if halted else 'loss scale'} {float(state['loss_scale']):g}"
    rates = f"learning rate {rate:.3g}" + f" and {scale}" * step.types.scaled
    line = f"{folder}: {what} in {_place(step, batch)} of {step.batches}, at {rates}; {_kept(broken, folder)}"
    return line, "  " + "\n  ".join(
        [
            f"first: {_where(step, fault, first)}",
            f"at update {int(state['update'])}: loss {loss}",
            *(
                f"finite before: update {row['update']} ({_place(step, int(row['batch']))}): loss {row['loss']:.4g}, "
                f"gradient norm {row['norm']:.4g}, rate {row['rate']:.3g}"
                for row in rows
            ),
            f"images and targets: {_inputs(step, fault, first)}",
            f"weights: {_weights(step, broken)}",
            _advice(step, config, fault, broken, rows, rate),
        ]
    )


def _place(step, batch):
    """Return where in the training a batch is, counted from 1."""
    epoch, place = divmod(batch, step.batches)
    return f"epoch {epoch + 1}, batch {place + 1}"


def not_finite(weights, statistics, slots):
    """Return {name: (NaN, Inf, index of the first)} of what a step or a Checkpoint holds and is not finite."""
    groups = {"": weights, "statistics ": statistics} | {f"{slot} ": kept for slot, kept in slots.items()}
    found = {f"{group}{name}": unfinite(array) for group, kept in groups.items() for name, array in kept.items()}
    return {name: about for name, about in found.items() if about}


def _look_again(step, first, count):
    """Replay the batches of the update that was not done; return (Fault or None or why it cannot be known, loss)."""
    check = CheckFinite()
    try:
        step.again(first, count, check)
    except (GpunetError, MemoryError) as error:
        return f"unknown, the batch could not be computed once more: {error}", "unknown"
    return check.fault, f"{step.losses()['loss']:.4g}"


def _kept(broken, folder):
    """Return where finite weights are."""
    if not broken:
        return "the weights before it are in last.safetensors"
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    there = f"the newest good ones are in {files[0].name}" if files else "no checkpoint was written before"
    return f"the weights in memory are not finite and are not saved; {there}"


def _where(step, fault, first):
    if fault is None:
        return "nothing: computed once more, every output of the batch is finite; the gradient's norm is not"
    if isinstance(fault, str):
        return fault
    text = f"{fault}; {_place(step, first + fault.run)}"
    if fault.path == "operands":  # one cast of all weights to the type that products take
        text += f", which is {_parameter(step, fault)} in {step.types.real}"
    share = _share(step, fault, first)
    if share.count > 1:
        text += f", replica {fault.replica + 1} of {share.count} with its images {share.first} to "
        text += f"{share.first + share.size - 1}"
    return text


def _share(step, fault, first):
    """Return the Share of a fault's replica in its batch."""
    place = (first + fault.run) % step.batches
    n = min(step.batch, len(step.source) - place * step.batch)
    return Share.of(n, fault.replica, min(step.replicas, n))


def _parameter(step, fault):
    """Return the name of the parameter in whose place an arena that was cast as a whole has the fault."""
    layout = next(layout for layout in step.layouts.values() if layout.size == fault.shape[0])
    return max((start, name) for name, start in layout.offsets.items() if start <= fault.index[0])[1]


def _inputs(step, fault, first):
    if isinstance(fault, str):
        return "unknown"
    if fault is None or fault.phase != "batch":
        return "finite"
    source, number = step.source, first + fault.run
    epoch, place = divmod(number, step.batches)
    place = place * step.batch + _share(step, fault, first).first + fault.index[0]
    image = source.images_of(step.seed, epoch)[place]
    what = "image" if fault.argument == "x" else "target"
    return f"{what} {image} of {source.name} (counted from 0) is not finite as the network gets it"


def _weights(step, broken):
    if broken:
        listed = [
            f"{name} ({nan + inf:,} of its values, the first at {list(index)})"
            for name, (nan, inf, index) in [*broken.items()][:SHOWN]
        ]
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        return f"not finite: {', '.join(listed)}{more}"
    sizes = {name: float(np.abs(array).max(initial=0)) for name, array in step.weights.copy().items()}
    name = max(sizes, key=sizes.get, default=None)
    return "finite" + (f", the largest is {sizes[name]:.4g} in {name}" if name else "")


def _advice(step, config, fault, broken, rows, rate):
    """Return what fits the case, as a sentence; the last words are what to change."""
    clip = config.optimizer.clip
    clip = f"a lower optimizer.clip ({clip / 10:.1g})" if clip else "optimizer.clip = 1"
    gentler = f"try a lower optimizer.lr ({rate / 10:.1g}), schedule.warmup = 1 or {clip}"
    if getattr(fault, "phase", "") == "batch":
        return (
            "Look at the data: gpunet data check, values of your own arrays, and preprocess.mean and preprocess.scale; "
            f"{step.types.real} holds up to {_largest(step.types.real):.3g}"
        )
    if broken:
        return (
            f"Something wrote NaN or Inf into {next(iter(broken))} after {_last(step)}, or that itself overflowed: go "
            f"on from the last good checkpoint. Where nothing but the optimizer writes to it: {gentler}"
        )
    if step.types.real == np.float16:
        return (
            f"float16 holds up to {_largest(step.types.real):.0f}, and the loss scale is at its smallest: "
            f"try train.dtype = bfloat16 or float32, or {gentler}"
        )
    norms = [row["norm"] for row in rows]
    if len(norms) > 1 and norms[-1] > ROSE * norms[0]:
        return f"The gradient's norm rose from {norms[0]:.3g} to {norms[-1]:.3g}: it diverged; {gentler}"
    return gentler[0].upper() + gentler[1:]


def _last(step):
    update = int(step.state["update"]) - 1
    return f"update {update}" if update >= 0 else "the beginning"


def _largest(dtype):
    return float(np.finfo(dtype).max) if dtype.kind == "f" else 3.39e38  # bfloat16's
