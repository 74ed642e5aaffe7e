"""The record that changes from step to step, with the memory layout of `struct State` in kernels/state.cuh.

Programs are replayed unchanged; what differs between two replays stands here (and in tables indexed by it).
"""

import numpy as np

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


def new_state() -> np.ndarray:
    """The state before the first batch: a zero-d array of STATE, its fields state["batch"] and so on."""
    state = np.zeros((), STATE)
    state["halt"] = -1
    for name in ("loss_scale", "gradient_scale", "lr_scale"):
        state[name] = 1
    return state
