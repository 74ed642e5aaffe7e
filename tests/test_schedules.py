"""Schedules against closed forms, and against what PyTorch 2.13's schedulers gave for the same settings."""

import math

import numpy as np
import pytest

from gpunet.optim import schedules
from gpunet.optim.schedules import SCHEDULES, const, cosine, cosine_restarts, linear, multistep, onecycle, poly, step

STEPS, PER_EPOCH, LR = 60, 5, 0.3
NEEDED = {
    "step": {"size": 2},
    "multistep": {"milestones": [1, 3]},
    "exp": {"gamma": 0.9},
    "inverse": {"gamma": 0.5},
    "c_over_t": {"c": 2},
    "sigmoid": {"gamma": -2.0, "size": 3},
    "cosine_restarts": {"period": 2},
}
SCALED = {  # from epochs of 10 updates to updates
    **dict.fromkeys(("size", "warmup", "c", "period"), lambda v: 10 * v),
    "milestones": lambda v: [10 * m for m in v],
    "gamma": lambda v: v / 10,
}
PLACES = [0, 1, 7, 17, 18, 19, 35, 58, 59]

# torch.optim.lr_scheduler, the rates at PLACES
COSINE = [0.3, 0.2998149871918675, 0.2910333575771221, 0.2499582527917279, 0.2443510090594837]
COSINE += [0.2385262697270285, 0.13005942891115968, 0.03073954412528309, 0.03018501280813253]
WARM_COSINE = [0.03, 0.057, 0.219, 0.28572405786990296, 0.28144600200657954]
WARM_COSINE += [0.27664918882530226, 0.15, 0.001182794802828335, 0.0002959907357592661]
ONECYCLE = [0.012, 0.014451873645518143, 0.11659252942962003, 0.3, 0.2995805712548987]
ONECYCLE += [0.29832463063527354, 0.18337860658088678, 0.0004206287451012893, 1.2e-06]
ONECYCLE_LINEAR = [0.03, 0.04928571428571428, 0.165, 0.28002, 0.27336, 0.2667, 0.16014, 0.00696, 0.0003]
EXP = [0.3, 0.285, 0.20950118882812493, 0.12543610056575313, 0.11916429553746546]
EXP += [0.11320608076059219, 0.04982501519628215, 0.015314060605080983, 0.014548357574826932]
POLY = [0.3, 0.29549622688071653, 0.26830787027245695, 0.22228325072846594, 0.21762535408116607]
POLY += [0.2129563528875098, 0.13643667820223715, 0.014051158264836463, 0.007529829273074638]
RESTARTS = [0.3, 0.2933926296998458, 0.08564899094051615, 0.22628871746483883, 0.2067172942406179]
RESTARTS += [0.1861186527804312, 0.28972373688902375, 0.08564899094051615, 0.07732451347542522]
SAME_RESTARTS = [0.3, 0.29672214011007086, 0.16567926949014802, 0.2870318186463901, 0.27135254915624213]
SAME_RESTARTS += [0.2503695909538287, 0.225, 0.012968181353609854, 0.0032778598899291466]
LINEAR = [0.3, 0.296, 0.272, 0.232, 0.228, 0.224, 0.16, 0.068, 0.064]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (cosine(STEPS, PER_EPOCH, LR, final=0.1), COSINE),  # CosineAnnealingLR(T_max=60, eta_min=.03)
        (
            cosine(STEPS, PER_EPOCH, LR, warmup=2),
            WARM_COSINE,
        ),  # SequentialLR: LinearLR(.1, 1, 10), cosine
        (onecycle(STEPS, PER_EPOCH, LR), ONECYCLE),  # OneCycleLR(total_steps=60)
        (  # OneCycleLR(pct_start=.25, anneal_strategy="linear", div_factor=10, final_div_factor=100)
            onecycle(STEPS, PER_EPOCH, LR, warmup=3, shape="linear", warmup_from=0.1, final=1e-3),
            ONECYCLE_LINEAR,
        ),
        (linear(STEPS, PER_EPOCH, LR, final=0.2), LINEAR),  # LinearLR(1, .2, total_iters=60)
        (schedules.exp(STEPS, PER_EPOCH, LR, gamma=0.95, unit="steps"), EXP),  # ExponentialLR(.95)
        (poly(STEPS, PER_EPOCH, LR, power=0.9), POLY),  # PolynomialLR(60, .9)
        # CosineAnnealingWarmRestarts(10, 2, eta_min=.03) and (15)
        (cosine_restarts(STEPS, PER_EPOCH, LR, period=2, multiplier=2, final=0.1), RESTARTS),
        (cosine_restarts(STEPS, PER_EPOCH, LR, period=3), SAME_RESTARTS),
    ],
)
def test_rates_are_those_of_pytorch(rates, expected):
    np.testing.assert_allclose(rates[PLACES], expected, rtol=1e-11)


def test_step_falls_by_gamma_every_size():
    expected = [LR * 0.5 ** (epoch // 3) for epoch in range(12) for _ in range(PER_EPOCH)]
    np.testing.assert_allclose(step(STEPS, PER_EPOCH, LR, size=3, gamma=0.5), expected, rtol=1e-15)


def test_multistep_falls_at_each_milestone():
    rates = multistep(STEPS, PER_EPOCH, LR, milestones=[9, 4])  # order does not matter
    np.testing.assert_allclose(rates[[0, 19, 20, 44, 45, 59]], [0.3, 0.3, 0.03, 0.03, 0.003, 0.003], rtol=1e-12)


def test_caffes_quick_policy_in_steps():
    rates = multistep(5000, 500, 0.001, milestones=[4000], unit="steps")
    assert rates[3999] == 0.001
    assert rates[4000] == pytest.approx(1e-4, rel=1e-12)


def test_warmup_climbs_in_a_straight_line_and_then_leaves_the_schedule_alone():
    rates = const(STEPS, PER_EPOCH, LR, warmup=4, warmup_from=0.25)
    np.testing.assert_allclose(np.diff(rates[:21]), LR * 0.75 / 20, rtol=1e-9)
    assert (rates[20:] == LR).all()
    whole, warm = step(STEPS, PER_EPOCH, LR, size=3), step(STEPS, PER_EPOCH, LR, size=3, warmup=1)
    assert (whole[5:] == warm[5:]).all()
    assert (whole[:5] > warm[:5]).all()


def caffe(policy, base_lr, iteration, gamma, power=None, stepsize=None, max_iter=None):
    """The rate as Caffe's solver computes it, one iteration at a time."""
    return {
        "exp": lambda: base_lr * math.pow(gamma, iteration),
        "inv": lambda: base_lr * math.pow(1 + gamma * iteration, -power),
        "poly": lambda: base_lr * math.pow(1 - iteration / max_iter, power),
        "sigmoid": lambda: base_lr * (1 / (1 + math.exp(-gamma * (iteration - stepsize)))),
    }[policy]()


@pytest.mark.parametrize(
    ("policy", "name", "settings"),
    [
        ("exp", "exp", {"gamma": 0.9995}),
        ("inv", "inverse", {"gamma": 1e-4, "power": 0.75}),
        ("poly", "poly", {"power": 2.0}),
        ("sigmoid", "sigmoid", {"gamma": -0.01, "size": 1000}),
        ("sigmoid", "sigmoid", {"gamma": 0.02, "size": 300}),
    ],
)
def test_caffes_policies_in_steps(policy, name, settings):
    rates = SCHEDULES[name](4000, 500, 0.01, unit="steps", **settings)
    given = {"gamma": None, "max_iter": 4000, **settings}
    given["stepsize"] = given.pop("size", None)
    expected = [caffe(policy, 0.01, iteration, **given) for iteration in range(4000)]
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_in_epochs_rates_fall_at_every_update():
    rates = schedules.exp(STEPS, PER_EPOCH, LR, gamma=0.9)
    np.testing.assert_allclose(rates[::PER_EPOCH], [LR * 0.9**epoch for epoch in range(12)], rtol=1e-12)
    np.testing.assert_allclose(rates[1:] / rates[:-1], 0.9 ** (1 / PER_EPOCH), rtol=1e-12)
    rates = schedules.inverse(STEPS, PER_EPOCH, LR, gamma=0.5)
    np.testing.assert_allclose(rates[[0, 10, 20, 40]], [LR, LR / 2, LR / 3, LR / 5], rtol=1e-12)
    rates = schedules.sigmoid(STEPS, PER_EPOCH, LR, gamma=-2.0, size=6)
    assert rates[30] == LR / 2
    np.testing.assert_allclose(rates[25] + rates[35], LR, rtol=1e-12)  # it is symmetric around size


def test_c_over_t_counts_from_one():
    np.testing.assert_allclose(schedules.c_over_t(5, 9, 0.6, unit="steps"), [0.6, 0.3, 0.2, 0.15, 0.12], rtol=1e-12)
    rates = schedules.c_over_t(STEPS, PER_EPOCH, LR, c=2)
    assert (rates[:10] == LR).all()  # updates 1 to 10 of 5 an epoch
    np.testing.assert_allclose(rates[[10, 19, 39]], [LR * 10 / 11, LR / 2, LR / 4], rtol=1e-12)


def test_poly_begins_its_fall_after_the_warm_up():
    rates = poly(STEPS, PER_EPOCH, LR, power=2.0, warmup=2)
    np.testing.assert_allclose(rates[10:], [LR * (1 - i / 50) ** 2 for i in range(50)], rtol=1e-12)


def test_restarts_begin_again_after_longer_and_longer_periods():
    rates = cosine_restarts(71, 5, LR, period=2, multiplier=2, warmup=1, warmup_from=0.5)
    assert np.flatnonzero(rates == LR).tolist() == [5, 15, 35]  # periods of 10, 20 and 40 updates after the warm-up
    assert rates[0] == LR / 2
    long = cosine_restarts(20, 5, LR, period=8, multiplier=1e300)
    np.testing.assert_allclose(long, cosine(40, 5, LR)[:20], rtol=1e-12)


def test_a_sigmoid_far_from_its_middle_is_one_or_nothing():
    assert schedules.sigmoid(3, 1, LR, gamma=1e6, size=1.5, unit="steps").tolist() == [0, 0, LR]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 47])
@pytest.mark.parametrize("warmup", [0, 0.3, 1, 99])
def test_every_table_is_float64_finite_and_never_above_the_rate(name, steps, warmup):
    needed = NEEDED.get(name, {})
    rates = SCHEDULES[name](steps, 10, 0.1, warmup=warmup, **needed)
    assert rates.dtype == np.float64
    assert rates.shape == (steps,)
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    assert rates.max() <= 0.1 * (1 + 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_epochs_and_steps_say_the_same(name):
    epochs = NEEDED.get(name, {}) | {"warmup": 1}
    steps = {k: SCALED[k](v) for k, v in epochs.items()}
    if name == "exp":
        steps["gamma"] = epochs["gamma"] ** 0.1
    one, other = SCHEDULES[name](50, 10, 0.1, **epochs), SCHEDULES[name](50, 10, 0.1, unit="steps", **steps)
    np.testing.assert_allclose(one, other, rtol=1e-12)
