"""The record that changes from step to step, with the memory layout of `struct State` in kernels/state.cuh.

Programs are replayed unchanged; what differs between two replays stands here (and in tables indexed by it).
"""

import numpy as np

# Where a run in float16 begins. The 65536 usual elsewhere suits losses that are means over the batch, so that a logit's
# gradient is of order 1/batch. Here losses are sums, that gradient is of order one, and 65536 times it is more than
# float16 holds (65504). 1024 leaves it a factor of 64 to grow by on its way back through the layers.
LOSS_SCALE = 1024.0

RATES = 16  # entries of lr_scale: how many parameter groups can be scaled between replays

STATE = np.dtype(
    [
        ("batch", np.int64),  # batches drawn: keys every random draw; moved by `advance` only
        ("update", np.int64),  # updates applied: indexes schedules and bias corrections
        ("halt", np.int64),  # batch at which a non-finite value stopped the run, or -1
        ("epoch", np.int32),  # batch // batches an epoch
        ("count", np.int32),  # images of the last finished gradient
        ("apply", np.int32),  # 1: the update may write, 0: its gradient was not finite
        ("good", np.int32),  # finite steps since the loss scale changed
        ("loss_scale", np.float64),  # the loss is multiplied by it before backward (half precision)
        ("gradient_scale", np.float64),  # 1/count, 1/loss scale and clipping in one factor
        ("lr_scale", np.float64, (RATES,)),  # a factor a group, written by the host between replays
    ],
    align=True,
)


def new_state(loss_scale=1.0) -> np.ndarray:
    """The state before the first batch: a zero-d array of STATE, its fields state["batch"] and so on."""
    state = np.zeros((), STATE)
    state["halt"] = -1
    state["loss_scale"] = loss_scale
    state["gradient_scale"] = state["lr_scale"] = 1
    return state
