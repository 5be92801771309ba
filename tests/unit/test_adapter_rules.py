"""Rules between the settings of the adapter: what has no effect or cannot go together is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_scripts.adapter_rules import writes_own_kind
from lora_scripts.config import RunConfig
from lora_scripts.config_file import load_config
from lora_scripts.errors import ConfigError


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"train_data_dir": "d", "base_model": "builtin:mini-sd", "output_dir": "o"} | settings
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora", "conv_rank": 4}, "conv_rank: has no effect because adapter is lora; locon trains"),
        (
            {"adapter": "oft", "lora_rank": 4},
            "lora_rank: has no effect because adapter is oft, whose size is oft_block",
        ),
        ({"adapter": "loha", "lora_init": "kaiming"}, "lora_init: has no effect because adapter is loha"),
        ({"adapter": "lokr", "lora_plus_ratio": 4}, "lora_plus_ratio: has no effect"),
        ({"oft_block_size": 8}, "oft_block_size: has no effect because adapter is lora"),
        ({"lokr_factor": 8}, "lokr_factor: has no effect"),
        ({"adapter": "loha", "conv_alpha": 2}, "conv_alpha: has no effect"),
        ({"export_as": "own"}, "export_as: has no effect because adapter is lora"),
        ({"optimizer": "prodigy", "block_rates": {"unet.mid": 1}}, "block_rates: prodigy finds one step size"),
        ({"optimizer": "prodigy", "preset": "style"}, "preset: sets rates of blocks"),
        ({"adapter": "locon", "task_type": "text-generation"}, "adapter: locon is for pictures"),
        ({"adapter": "dora", "lora_init": "pissa"}, "lora_init: pissa is not possible with adapter: dora"),
        ({"block_ranks": {"unet": -1}}, "greater than or equal to 0"),
        ({"block_rates": {"unet": 0}}, "greater than 0"),
    ],
)
def test_setting_without_effect_or_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "own"),
    [
        ({}, False),
        ({"adapter": "dora"}, False),
        ({"adapter": "dora", "export_as": "own"}, True),
        ({"adapter": "lokr"}, True),
        ({"adapter": "oft", "export_as": "plain"}, False),
        ({"adapter": "loha", "task_type": "text-generation"}, False),
    ],
)
def test_form_of_the_file_follows_kind_and_setting(settings: dict[str, Any], own: bool) -> None:
    assert writes_own_kind(config(**settings)) is own


def test_block_ranks_can_be_set_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train_data_dir: d\nbase_model: builtin:mini-sd\noutput_dir: o\n", "utf-8")
    found, _ = load_config(file, ["block_ranks={unet.down: 4, text_encoder: 0}"])
    assert found.block_ranks == {"unet.down": 4, "text_encoder": 0}
    with pytest.raises(ConfigError, match="block_ranks"):
        load_config(file, ["block_ranks={unet.down: many}"])
