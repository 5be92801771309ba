import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lora_scripts
from lora_scripts.training.draws import Draws

KEYS = ["0/cat.png#0", "0/dog.png#0", "0/猫.png#1"]


def test_values_do_not_depend_on_the_batch():
    draws = Draws(42)
    together = draws.normal(KEYS, (4, 8, 8), "noise")
    for i, key in enumerate(KEYS):
        assert torch.equal(draws.normal([key], (4, 8, 8), "noise")[0], together[i])
    assert torch.equal(draws.normal(KEYS[::-1], (4, 8, 8), "noise"), together.flip(0))
    assert torch.equal(draws.integers(KEYS, 0, 1000, "timestep")[1:], draws.integers(KEYS[1:], 0, 1000, "timestep"))
    assert torch.equal(draws.uniform(KEYS, "dropout")[1:], draws.uniform(KEYS[1:], "dropout"))


def test_values_do_not_depend_on_torchs_global_generator():
    torch.manual_seed(1)
    first = Draws(42).normal(KEYS, (5,), "noise")
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(Draws(42).normal(KEYS, (5,), "noise"), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("seed", "key", "stream"), [(43, KEYS[0], "noise"), (42, KEYS[1], "noise"), (42, KEYS[0], "offset")]
)
def test_seed_key_and_stream_each_change_the_values(seed, key, stream):
    first = Draws(42).normal([KEYS[0]], (64,), "noise")
    assert not torch.isclose(Draws(seed).normal([key], (64,), stream), first).any()


def test_values_are_the_same_in_another_process():
    code = (
        "from lora_scripts.training.draws import Draws;"
        "d = Draws(42);"
        f"print(d.integers({KEYS!r}, 0, 1000, 'timestep').tolist(), d.seed_for({KEYS[2]!r}, 'noise'))"
    )
    draws = Draws(42)
    out = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
        env=_env(),
    )
    assert (
        out.stdout.split("\n")[0]
        == f"{draws.integers(KEYS, 0, 1000, 'timestep').tolist()} {draws.seed_for(KEYS[2], 'noise')}"
    )


def _env():
    return {**os.environ, "PYTHONPATH": str(Path(lora_scripts.__file__).parents[1]), "PYTHONHASHSEED": "7"}


def test_values_stay_as_they_are_written_down():
    # A change here breaks resuming of every run that was begun before it.
    draws = Draws(42)
    assert draws.seed_for("0/cat.png#0", "noise") == 16493523902131573850
    assert draws.integers(KEYS, 0, 1000, "timestep").tolist() == [161, 216, 524]
    torch.testing.assert_close(
        draws.normal(KEYS[:1], (3,), "noise")[0], torch.tensor([-1.307754, -0.573189, 1.017745]), atol=1e-5, rtol=0
    )


def test_normal_values_are_standard_normal():
    values = Draws(0).normal([str(i) for i in range(64)], (4, 16, 16), "noise")
    assert values.dtype == torch.float32
    assert values.shape == (64, 4, 16, 16)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    # One value of every example: independent between the examples too.
    first = Draws(0).normal([str(i) for i in range(4096)], (1,), "noise")
    assert abs(first.mean()) < 0.06
    assert abs(first.std() - 1) < 0.05


def test_integers_and_uniform_cover_their_range_evenly():
    keys = [str(i) for i in range(4000)]
    integers = Draws(1).integers(keys, 10, 20, "timestep")
    assert integers.dtype == torch.int64
    counts = torch.bincount(integers, minlength=20)[10:]
    assert counts.sum() == 4000
    assert counts.min() > 320
    assert counts.max() < 480
    uniform = Draws(1).uniform(keys, "dropout")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"no integer is in \[5, 5\)"):
        Draws(0).integers(["a"], 5, 5, "timestep")


def test_one_latent_takes_well_under_a_millisecond():
    draws = Draws(0)
    times = []
    for i in range(50):
        began = time.perf_counter()
        draws.normal([str(i)], (4, 64, 64), "noise")
        times.append(time.perf_counter() - began)
    assert sorted(times)[5] < 1e-3
