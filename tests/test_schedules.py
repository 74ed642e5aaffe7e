"""Schedules against closed forms, and against what PyTorch 2.13's schedulers gave for the same settings."""

import numpy as np
import pytest

from gpunet.optim.schedules import SCHEDULES, const, cosine, linear, multistep, onecycle, step

STEPS, PER_EPOCH, LR = 60, 5, 0.3
PLACES = [0, 1, 7, 17, 18, 19, 35, 58, 59]

# torch.optim.lr_scheduler, the rates at PLACES
COSINE = [0.3, 0.2998149871918675, 0.2910333575771221, 0.2499582527917279, 0.2443510090594837]
COSINE += [0.2385262697270285, 0.13005942891115968, 0.03073954412528309, 0.03018501280813253]
WARM_COSINE = [0.03, 0.057, 0.219, 0.28572405786990296, 0.28144600200657954]
WARM_COSINE += [0.27664918882530226, 0.15, 0.001182794802828335, 0.0002959907357592661]
ONECYCLE = [0.012, 0.014451873645518143, 0.11659252942962003, 0.3, 0.2995805712548987]
ONECYCLE += [0.29832463063527354, 0.18337860658088678, 0.0004206287451012893, 1.2e-06]
ONECYCLE_LINEAR = [0.03, 0.04928571428571428, 0.165, 0.28002, 0.27336, 0.2667, 0.16014, 0.00696, 0.0003]
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


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 47])
@pytest.mark.parametrize("warmup", [0, 0.3, 1, 99])
def test_every_table_is_float64_finite_and_never_above_the_rate(name, steps, warmup):
    needed = {"step": {"size": 2}, "multistep": {"milestones": [1]}}.get(name, {})
    rates = SCHEDULES[name](steps, 10, 0.1, warmup=warmup, **needed)
    assert rates.dtype == np.float64
    assert rates.shape == (steps,)
    assert np.isfinite(rates).all()
    assert (rates > 0).all()
    assert rates.max() <= 0.1 * (1 + 1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_epochs_and_steps_say_the_same(name):
    epochs = {"step": {"size": 2}, "multistep": {"milestones": [1, 3]}}.get(name, {}) | {"warmup": 1}
    steps = {k: [10 * m for m in v] if isinstance(v, list) else 10 * v for k, v in epochs.items()}
    one, other = SCHEDULES[name](50, 10, 0.1, **epochs), SCHEDULES[name](50, 10, 0.1, unit="steps", **steps)
    assert (one == other).all()
