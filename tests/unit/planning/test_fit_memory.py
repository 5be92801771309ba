"""What the check before a run has found to fit is taken over, and nothing else of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.trained_family import family_with_adapter
from lora_scripts.config import RunConfig
from lora_scripts.planning.fit_memory import FittedRun, fit_memory


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_a_cut_that_the_check_chose_keeps_the_steps_of_a_run_on_several_processes(
    batch_size: Any, tmp_path: Path
) -> None:
    family, adapter = family_with_adapter(tmp_path)
    here = {"train_data_dir": tmp_path, "base_model": "x", "output_dir": tmp_path, "batch_size": batch_size}
    alone = RunConfig.model_validate(here | {"gradient_accumulation_steps": 2})
    cut = {"batch_size": 2, "gradient_accumulation_steps": alone.step_size // 2, "gradient_checkpointing": True}
    planned = FittedRun(alone.model_copy(update=cut), "predicted")
    spread = alone.model_copy(update={"gradient_accumulation_steps": 6})  # on three processes
    data: Any = None  # nothing is asked of it
    fitted = fit_memory(spread, family, adapter, data, torch.device("cpu"), None, planned)
    assert fitted.config.step_size == spread.step_size
    assert (fitted.config.batch_size, fitted.config.gradient_checkpointing) == (2, True)
    assert fitted.summary == "predicted"
