"""The choice among saved steps by pictures, and the pictures that are fitted worst, in whole runs."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import draw_pictures
from helpers.seen import Seen
from integration.test_training_run import StopAfter, train
from lora_scripts.builtin.world import canonical_caption, draw, random_scene
from lora_scripts.errors import ModelError
from lora_scripts.training.checkpoint import load_checkpoint

Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def previewed(settings: Settings, tmp_path: Path) -> Settings:
    """Settings of a run whose four previews meet every save; twelve pictures, two of them held out."""
    folder = draw_pictures(tmp_path / "twelve", 12)

    def make(**changes: Any) -> dict[str, Any]:
        values = {"train_data_dir": str(folder), "validate_every": 2, "sample_every": 2, "sample_steps": 2}
        return settings(**values | {"cache_dir": str(tmp_path / "cache")} | changes)

    return make


def columns(outcome: Any) -> list[str]:
    return [what for what, _ in outcome.choice.scores[-1].values]


def test_saved_steps_are_compared_by_loss_look_and_prompt(previewed: Settings) -> None:
    values = previewed()
    outcome = train(values)
    assert [score.step for score in outcome.choice.scores] == [2, 4, 6]
    assert columns(outcome) == ["held-out loss", "look", "prompt"]
    assert "builtin:mini-clip" in outcome.choice.why
    page = (Path(values["output_dir"]) / "report.html").read_text("utf-8")
    assert "Better than the last step by" in page


def test_comparing_leaves_the_last_step_as_it_was(previewed: Settings) -> None:
    values = previewed(save_precision="fp32", learning_rate=1e-6)
    outcome = train(values)
    assert outcome.choice.step == 6
    out = Path(values["output_dir"])
    finished, saved = load_file(out / "run.safetensors"), load_file(out / "checkpoint-6" / "run-6.safetensors")
    assert all(torch.equal(finished[key], saved[key]) for key in saved)


def test_stopped_and_resumed_run_makes_the_same_choice(previewed: Settings, tmp_path: Path) -> None:
    whole = train(previewed(output_dir=str(tmp_path / "a" / "run")))
    values = previewed(output_dir=str(tmp_path / "b" / "run"))
    assert not train(values, StopAfter(3)).complete
    # Previews of a killed run may be missing or be left over from another one: they are rendered again.
    samples = Path(values["output_dir"]) / "samples"
    (samples / "step-000002-1.png").unlink()
    Image.new("RGB", (32, 32), "red").save(samples / "step-000002-2.png")
    resumed = train(values)
    assert resumed.choice == whole.choice
    assert resumed.hard_examples == whole.hard_examples
    kept = [load_checkpoint(tmp_path / name / "run" / "checkpoint-6") for name in ("a", "b")]
    losses = [each.loop["picture_losses"] for each in kept if each is not None]
    assert losses[0] == losses[1]


def test_run_that_is_started_again_after_its_end_makes_the_same_choice(previewed: Settings) -> None:
    values = previewed()
    assert train(values).choice == train(values).choice


def test_damaged_checkpoint_is_not_compared(previewed: Settings) -> None:
    values = previewed()

    class Damage(Seen):
        def previewed(self, preview: Any) -> None:
            if preview.step == 6:
                file = Path(values["output_dir"]) / "checkpoint-4" / "adapter.safetensors"
                file.write_bytes(file.read_bytes()[:-1] + b"x")

    outcome = train(values, Damage())
    assert [score.step for score in outcome.choice.scores] == [2, 6]


def test_clip_that_does_not_know_the_set_has_no_say(previewed: Settings, tmp_path: Path) -> None:
    folder = draw_pictures(tmp_path / "muddled", 12)
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    captions = [caption for _, caption in rows[1:]]
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        pairs = [(row[0], captions[(place + 5) % 12]) for place, row in enumerate(rows[1:])]
        csv.writer(file).writerows([rows[0], *pairs])
    seen = Seen()
    outcome = train(previewed(train_data_dir=str(folder)), seen)
    assert columns(outcome) == ["held-out loss"]
    assert any("does not know its way about this set" in note for note in seen.notes)


def test_without_clip_only_the_loss_chooses(previewed: Settings) -> None:
    assert columns(train(previewed(clip_model="none"))) == ["held-out loss"]


def test_keep_last_compares_nothing(previewed: Settings) -> None:
    outcome = train(previewed(keep="last"))
    assert (outcome.choice.step, outcome.choice.scores) == (6, ())


def test_clip_that_is_not_there_is_told_before_training(previewed: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        train(previewed(clip_model=str(tmp_path / "clip")))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_finished_run_survives_a_clip_that_breaks_meanwhile(
    previewed: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ModelError("clip: cannot be loaded.")

    monkeypatch.setattr("lora_scripts.choosing.by_pictures.Embedder", broken)
    seen = Seen()
    outcome = train(previewed(), seen)
    assert columns(outcome) == ["held-out loss"]
    assert any("clip: cannot be loaded" in note for note in seen.notes)


def test_two_pictures_that_do_not_belong_are_named_as_worst_fitted(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(12)]
    for number, scene in enumerate(scenes):
        draw(scene, number, style="ink wash").save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(canonical_caption(scene), "utf-8")
    for name in ("04.png", "10.png"):
        blocks = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        blocks.resize((128, 128), Image.Resampling.NEAREST).save(folder / name)
    values = {
        "train_data_dir": str(folder),
        "base_model": "builtin:mini-sd",
        "output_dir": str(tmp_path / "run"),
        "batch_size": 6,
        "max_steps": 24,
        "learning_rate": 1e-3,
        "validation_pictures": 0,
        "sample_every": 0,
    }
    seen = Seen()
    outcome = train(values, seen)
    assert {each.example.name for each in outcome.hard_examples if each.outlying} == {"04.png", "10.png"}
    assert {each.example.name for each in outcome.hard_examples[:2]} == {"04.png", "10.png"}
    (told,) = [note for note in seen.notes if note.startswith("Pictures that the model could not fit")]
    assert "04.png" in told
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "Worst fitted" in page
    assert page.index("times the usual") > page.index('id="worst-fitted"')
