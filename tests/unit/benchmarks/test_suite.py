"""What the suites of benchmarks/run.py share: trainers stopped after every step, equal random numbers, what is exchanged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]

TRAINER = """
import sys, torch
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.5)
for _ in range(4):
    (weight @ weight).backward()
    optimizer.step()
    optimizer.zero_grad()
print("to standard output", sys.argv[1])
"""


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "stand_ins"))


def test_a_trainer_stands_still_after_every_step_and_its_loss_is_told(tmp_path: Path) -> None:
    from suite.trainers import Command

    (tmp_path / "trainer.py").write_text(TRAINER, "utf-8")
    stepper = Command(sys.executable, tmp_path / "trainer.py", ["an argument"], stand_in=False).start("it", tmp_path, 1)
    try:
        # w -> w - 0.5 * 2 w = 0 after the first step.
        assert (stepper.facts["loss"], stepper.facts["num_trained"]) == (3.0, 3)
        second = stepper.step("flops")
        assert second["loss"] == 0.0
        assert second["flops"] == 0  # a product of two vectors is not among what torch counts
        assert {"cpu_s", "wall_s", "peak_bytes"} <= second.keys()
    finally:
        stepper.close()


def test_a_trainer_that_ends_is_told_with_what_it_printed(tmp_path: Path) -> None:
    from suite.trainers import Command

    (tmp_path / "trainer.py").write_text("raise SystemExit('no such model')", "utf-8")
    with pytest.raises(SystemExit, match="no such model"):
        Command(sys.executable, tmp_path / "trainer.py", [], stand_in=False).start("it", tmp_path, 1)


def test_a_peers_noise_noise_levels_latents_and_order_are_those_of_our_steps(tmp_path: Path) -> None:
    """What diffusers' and sd-scripts' loops ask for, asked in a process of its own because the answers replace torch's."""
    from suite.materials import make_pictures

    from lora_scripts.data.sampler import StepPlan
    from lora_scripts.objectives.ddpm import sample_timesteps
    from lora_scripts.training.draws import Draws

    pictures = make_pictures(tmp_path / "pictures", side=32, batch_size=2, steps=3)
    asking = f"""
import json, sys, torch
sys.path.insert(0, {str(ROOT / "benchmarks" / "stand_ins")!r})
import equal_draws
from pathlib import Path
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
steps = equal_draws.put_in_place(Path({str(pictures.draws)!r}))
told = []
for _ in range(3):
    latents = DiagonalGaussianDistribution(torch.zeros(2, 8, 4, 4)).sample()
    noise = torch.randn_like(latents)
    told.append([latents.tolist(), noise.tolist(), torch.randint(0, 1000, (2,), device="cpu").tolist()])
    steps.next()
loader = torch.utils.data.DataLoader(range(6), shuffle=True, batch_size=2)
other = torch.randn_like(torch.zeros(5)).tolist()
print(json.dumps([told, [batch.tolist() for batch in loader], other]))
"""
    done = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True, check=True)
    told, order, other = json.loads(done.stdout)
    names = [f"{number:03}.png" for number in range(6)]
    plan, draws = StepPlan(names, [(32, 32)] * 6, [1] * 6, 2, 42), Draws(42)
    for number, (latents, noise, timesteps) in enumerate(told):
        keys = [use.key for use in plan.step(number)]
        torch.testing.assert_close(torch.tensor(latents), draws.normal(keys, (4, 4, 4), "posterior"))
        torch.testing.assert_close(torch.tensor(noise), draws.normal(keys, (4, 4, 4), "noise"))
        assert timesteps == sample_timesteps(draws, keys, 1000).tolist()
    assert order == [[0, 1], [2, 3], [4, 5]]
    assert len(set(other)) == 5  # any other call is torch's own
    used = [names[use.index] for number in range(3) for use in plan.step(number)]
    for number, name in enumerate(used):
        assert (pictures.table / f"{number:03}.png").read_bytes() == (pictures.plain / name).read_bytes()


def test_bytes_exchanged_in_a_step_are_the_gradients_of_the_adapter() -> None:
    from suite.scale import Link, adapter_bytes, exchange_s

    # 128 attention layers of Stable Diffusion 1.5 at rank 8: 1,594,368 weights, the number that diffusers' example trains.
    assert adapter_bytes("sd15", 8) == 4 * 1_594_368
    # A ring of two sends half of it and takes half of it: all bytes once, in two messages.
    assert exchange_s(1000, 2, Link("", bandwidth=100.0, latency_s=1.0)) == pytest.approx(10.0 + 2.0)


@pytest.mark.parametrize("below", ["", "examples/text_to_image", "examples/text_to_image/train_text_to_image_lora.py"])
def test_a_peer_is_found_in_its_checkout_its_folder_or_by_its_script(tmp_path: Path, below: str) -> None:
    from suite.trainers import find_peer

    folder = tmp_path / "examples" / "text_to_image"
    folder.mkdir(parents=True)
    (folder / "train_text_to_image_lora.py").touch()
    peer = find_peer(f"{tmp_path / below}=other/python")
    assert (peer.kind, peer.folder, peer.python) == ("diffusers", folder, "other/python")


def test_a_path_without_a_peer_is_refused(tmp_path: Path) -> None:
    from suite.trainers import find_peer

    with pytest.raises(ValueError, match=r"neither train_text_to_image_lora\.py nor train_network\.py"):
        find_peer(str(tmp_path))


def test_what_was_not_measured_says_why() -> None:
    from suite.captions import caption_contests
    from suite.captions import tell as tell_captions
    from suite.pictures import gpu_contests, tell

    contests = gpu_contests("cuda", tiny=False)
    text = tell(contests, {}, "no GPU")
    assert text.count("not measured: no GPU") == len(contests) == 6
    assert tell_captions(caption_contests("cuda", tiny=False), {}, "no GPU").count("not measured: no GPU") == 3


def test_a_result_is_told_with_its_ratio_paired_by_turn() -> None:
    from suite.pictures import Contest, result_rows
    from suite.trainers import Work

    def side(wall: list[float], losses: list[float]) -> dict[str, Any]:
        return {"wall_s": wall, "cpu_s": wall, "losses": losses, "peak_bytes": 2e9, "peak_cuda_bytes": None}

    result = {
        "sides": {"ours": side([1.0, 2.0, 1.0], [1.0, 1.0]), "diffusers": side([2.0, 8.0, 3.0], [1.0, 1.25])},
        "first_step_s": {who: {"cold": [9.0], "warm": [5.0]} for who in ("ours", "diffusers")},
        "flops_per_step": 5e11,
        "matmul_peak": [1e12, 8e11],
    }
    ours, theirs = result_rows(Contest("it", Work("sd15", 512, 1), "diffusers"), result)
    assert "50 %" in ours  # of 1 TFLOP/s, in the median second
    assert "3.00 (2.00 to 4.00)" in theirs
    assert theirs[-2:] == ["20.00 %", "11.11 %"]


def test_budgets_that_were_not_measured_say_why_and_failures_what_they_lacked() -> None:
    from suite.budgets import budget_contests, last_words, tell

    contests = budget_contests("cuda", tiny=False)
    assert {name.split("-")[1] for name in contests} == {"8", "16"}
    assert tell(contests, {}, "no GPU").count("not measured: no GPU") == len(contests) == 12
    words = last_words("error: Out of memory with a single example (CUDA).\nthe end of a log\n")
    text = tell(contests, {"budget-8-sdxl-plain": {"failed": words}}, "no GPU")
    assert "| 8 GB | sdxl, 1024 px, plain | does not run: error: Out of memory with a single example (CUDA). |" in text


def test_a_run_within_a_budget_tells_what_was_chosen_and_how_fast_it_is(tmp_path: Path) -> None:
    import argparse

    from suite.budgets import budget_contests, hold, tell

    # The tiny SDXL takes more than this, so blocks are swapped; what it takes all the same is not held against it on a CPU.
    contests = budget_contests("cpu", tiny=True, budgets_gb=[0.0006])
    name, budget = next(iter(contests.items()))
    result = hold(budget, tmp_path, argparse.Namespace(steps=1, threads=1))
    assert "failed" not in result
    assert result["chosen"]["block_swap"] > 0
    assert result["chosen"]["gradient_checkpointing"] is True
    assert result["flops_per_step"] > 0
    assert json.loads(json.dumps(result))["contest"]["memory_gb"] == 0.0006
    row = next(line for line in tell({name: budget}, {name: result}, "not run").splitlines() if "tiny-sdxl" in line)
    assert "not measured" not in row
