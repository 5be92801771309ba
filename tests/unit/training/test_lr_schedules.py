import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler

from lora_scripts.training.lr_schedules import SCHEDULES, learning_rate_factor, resolve_warmup


def reference(name, total, warmup, make=get_scheduler, **options):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    if make is get_scheduler:
        options["name"] = name
    scheduler = make(optimizer=optimizer, num_warmup_steps=warmup, num_training_steps=total, **options)
    factors = []
    for _ in range(total):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "rex"])
@pytest.mark.parametrize(("total", "warmup"), [(40, 0), (40, 7), (6, 5), (1, 0)])
def test_factor_is_that_of_diffusers(name, total, warmup):
    ours = [learning_rate_factor(name, step, total, warmup, final_factor=1e-7) for step in range(total)]
    assert ours == pytest.approx(reference(name, total, warmup), abs=1e-12)


def test_restarts_power_and_cycles_are_those_of_diffusers():
    ours = [learning_rate_factor("cosine_with_restarts", s, 40, 4, num_cycles=3) for s in range(40)]
    assert ours == pytest.approx(reference("cosine_with_restarts", 40, 4, num_cycles=3), abs=1e-12)
    ours = [learning_rate_factor("polynomial", s, 40, 4, power=2.0, final_factor=1e-7) for s in range(40)]
    assert ours == pytest.approx(reference("polynomial", 40, 4, power=2.0), abs=1e-12)
    ours = [learning_rate_factor("cosine", s, 40, 4, num_cycles=1.5) for s in range(40)]
    assert ours == pytest.approx(reference("cosine", 40, 4, get_cosine_schedule_with_warmup, num_cycles=1.5), abs=1e-12)


def test_rex_is_the_papers_formula():
    for step in range(100):
        z = step / 100
        assert learning_rate_factor("rex", step, 100) == pytest.approx((1 - z) / (1 / 2 + 1 / 2 * (1 - z)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_factor_stays_within_bounds_even_past_the_end(name):
    for step in range(80):
        assert 0.0 <= learning_rate_factor(name, step, 50, 5) <= 1.0


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no learning-rate schedule is named 'cosin'; known: constant, "):
        learning_rate_factor("cosin", 0, 10)


@pytest.mark.parametrize(
    ("asked", "total", "steps"), [("auto", 1000, 50), ("auto", 10000, 100), ("auto", 15, 0), (7, 1000, 7), (0, 10, 0)]
)
def test_auto_warmup_is_a_twentieth_and_at_most_a_hundred(asked, total, steps):
    assert resolve_warmup(asked, total) == steps
