"""Twenty steps of each picture family end at the losses they always ended at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_diffusion import save_folder, tiny_parts
from lora_scripts.config import RunConfig
from lora_scripts.train_command import train_and_report
from lora_scripts.training.events import Listener, StepReport

Settings = Callable[..., dict[str, Any]]
GOLDEN: dict[str, list[float]] = {
    "sd15": [0.999287, 1.10933, 1.15674, 1.11554, 1.03936, 1.16658],
    "sd2": [0.0202923, 0.254744, 0.364739, 0.361198, 0.279114, 0.282171],
    "sdxl": [0.963659, 1.12848, 1.13121, 1.07726, 1.02958, 1.13805],
}
"""Losses of steps 1, 2, 5, 10, 15 and 20. Whoever changes them on purpose shows the curve."""


class _Losses(Listener):
    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, report: StepReport) -> None:
        self.values += report.losses


@pytest.mark.parametrize("family", GOLDEN)
def test_twenty_steps_give_the_losses_they_always_gave(family: str, settings: Settings, tmp_path: Path) -> None:
    kind = "v_prediction" if family == "sd2" else "epsilon"
    model = save_folder(tiny_parts(family, prediction_type=kind), tmp_path / "model")
    losses = _Losses()
    values = settings(
        base_model=str(model), resolution=64, max_steps=20, save_steps=20, train_text_encoder=True, keep="last",
        learning_rate=2e-3, validation_pictures=0,
    )  # fmt: skip
    train_and_report(RunConfig.model_validate(values), more=[losses])
    assert len(losses.values) == 20
    found = [losses.values[step - 1] for step in (1, 2, 5, 10, 15, 20)]
    assert found == pytest.approx(GOLDEN[family], rel=1e-3)
