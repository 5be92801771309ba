"""The settings file: what is accepted, and what a user is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_scripts.config import RunConfig
from lora_scripts.config_file import load_config, make_config
from lora_scripts.errors import ConfigError

NINE_KEYS = """\
train_data_dir: "./data/style_train"
metadata_path: "./data/style_train/metadata.csv"
base_model: "./models/Stable-diffusion/v1-5-pruned.safetensors"
lora_rank: 8
batch_size: 4
epochs: 10
learning_rate: 2e-4          # YAML reads 2e-4 as text: numbers written so are accepted
output_dir: "./output/my_style_lora"
save_steps: 100
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "my.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def faults_of(folder: Path, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), overrides)
    return caught.value.faults


def test_nine_keys_are_enough(tmp_path: Path) -> None:
    config, advice = load_config(write(tmp_path, NINE_KEYS))
    assert (config.lora_rank, config.alpha, config.epochs, config.learning_rate) == (8, 8.0, 10, 2e-4)
    assert config.name == "my_style_lora"
    assert config.task_type == "text-to-image"
    assert advice == []


@pytest.mark.fault(21)
def test_number_written_as_text_is_a_number(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, NINE_KEYS.replace("2e-4", '"1e-4"')))
    assert config.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("written", "size"),
    [("512", (512, 512)), ('"768x768"', (768, 768)), ("[768, 512]", (768, 512)), ('"640×512"', (640, 512))],
)
def test_resolution_spellings(tmp_path: Path, written: str, size: tuple[int, int]) -> None:
    config, _ = load_config(write(tmp_path, f"{NINE_KEYS}resolution: {written}\n"))
    assert config.resolution == size


@pytest.mark.fault(21)
def test_unknown_key_names_line_and_nearest_setting(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, NINE_KEYS.replace("lora_rank", "lora_rnak"))
    assert faults == [f"{tmp_path / 'my.yaml'} line 4: lora_rnak: no such setting. Did you mean lora_rank?"]


@pytest.mark.fault(21)
def test_all_faults_come_at_once(tmp_path: Path) -> None:
    text = (
        NINE_KEYS.replace("batch_size: 4", "batch_size: -4").replace("2e-4 ", ".nan ")
        + "optimizer: adam\nlr_cycles: 3\n"
    )
    faults = "\n".join(faults_of(tmp_path, text, "lora_rnak=3"))
    for part in (
        "line 5: batch_size: should be greater than or equal to 1",
        "line 7: learning_rate: must be a finite number",
        "line 10: optimizer: must be one of 'adamw'",
        "line 11: lr_cycles: has no effect because lr_scheduler is cosine",
        "--set lora_rnak: no such setting",
    ):
        assert part in faults


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("text_encoder_learning_rate: 1e-4", "has no effect because train_text_encoder is false"),
        ("caption_keep: 2", "has no effect because caption_shuffle is false"),
        ("sample_every: 0\nsample_prompts: [a cat]", "has no effect because sample_every is 0"),
        ("buckets: false\nmax_aspect: 3", "has no effect because buckets is false"),
        ("lr_scheduler: constant\nwarmup_steps: 10", "has no effect because lr_scheduler is constant"),
        ("zero_terminal_snr: true\nprediction: epsilon", "needs prediction: v_prediction"),
        ("min_timestep: 900\nmax_timestep: 100", "is above max_timestep"),
        ("debiased_estimation: true\nmin_snr_gamma: 5", "has no effect because debiased_estimation is true"),
        ("huber_c: 0.2", "has no effect because loss_type is l2"),
        ("huber_schedule: constant", "has no effect because loss_type is l2"),
        ("pyramid_noise_discount: 0.2", "has no effect because pyramid_noise_iterations is 0"),
        ("optimizer: adamw_schedulefree\nema_decay: 0.99", "averages the weights by itself"),
        ("prior_prompt: a cat", "has no effect because prior_preservation_weight is 0"),
        ("prior_preservation_weight: 1", "needs prior_prompt, the class"),
        ("prior_preservation_weight: 1\nprior_prompt: a SKS cat\ntrigger_word: sks", "holds the trigger word 'sks'"),
        (
            "prior_preservation_weight: 1\nprior_prompt: a sks cat\nfolders: [{path: b, trigger_word: sks}]",
            "holds the trigger word 'sks'",
        ),
        ("optimizer: prodigy\nlora_plus_ratio: 16", "lora_plus_ratio: prodigy finds one step size for all"),
        ("lora_plus_ratio: 0.5", "greater than or equal to 1"),
        ("adapter: dora\nlora_init: pissa", "lora_init: pissa is not possible with adapter: dora"),
        ("lora_init: pissa\ninit_lora_weights: a.safetensors", "the matrices begin as in init_lora_weights"),
        ("resolution: 500", "multiple of 8; nearest: 496x496"),
        ("learning_rate: -1", "greater than 0"),
        ("lora_rank: 2.5", "valid integer"),
        ("output_name: 'a/b'", "characters that a file name cannot have"),
    ],
)
def test_settings_that_contradict_or_do_nothing_are_refused(tmp_path: Path, line: str, text: str) -> None:
    base = "\n".join(row for row in NINE_KEYS.splitlines() if row.split(":")[0] not in line) + "\n"
    assert any(text in fault for fault in faults_of(tmp_path, base + line + "\n"))


@pytest.mark.fault(21)
def test_missing_keys_are_named_together(tmp_path: Path) -> None:
    faults = faults_of(tmp_path, "lora_rank: 8\n")
    assert [fault.split(": ")[1] for fault in faults] == ["train_data_dir", "base_model", "output_dir"]


@pytest.mark.fault(21)
def test_key_set_twice_is_refused(tmp_path: Path) -> None:
    assert "line 10: lora_rank: is set twice, first in line 4" in faults_of(tmp_path, NINE_KEYS + "lora_rank: 16\n")[0]


@pytest.mark.fault(21)
def test_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\n"
    assert "aliases" in faults_of(tmp_path, bomb)[0]


@pytest.mark.fault(21)
def test_ten_megabytes_are_refused_unread(tmp_path: Path) -> None:
    assert "10,000,000 bytes" in faults_of(tmp_path, b"#" * 10_000_000)[0]


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "must be lines of `key: value`"),
        ("a: [1, 2\nb: 3\n", "my.yaml line 2"),
        ('train_data_dir: "D:\\pictures"\n', "forward slashes"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\xff", "is not"),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path: Path, content: str | bytes, text: str) -> None:
    faults = faults_of(tmp_path, content)
    assert len(faults) == 1
    assert text in faults[0]


def test_chinese_file_in_gbk_is_read(tmp_path: Path) -> None:
    text = NINE_KEYS.replace("style_train", "国画风格").encode("gb18030")
    config, _ = load_config(write(tmp_path, text))
    assert config.train_data_dir == Path("data/国画风格")


def test_overrides_win(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, NINE_KEYS), ["max_steps=20", "learning_rate=1e-3", "sample_prompts=[a, b]"])
    assert (config.max_steps, config.learning_rate, config.sample_prompts) == (20, 1e-3, ["a", "b"])


@pytest.mark.fault(21)
def test_override_without_value_is_explained(tmp_path: Path) -> None:
    assert "write key=value" in faults_of(tmp_path, NINE_KEYS, "max_steps")[0]


@pytest.mark.fault(21)
def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, NINE_KEYS)
    with pytest.raises(ConfigError, match=r"Did you mean my\.yaml"):
        load_config(tmp_path / "mi.yaml")


def test_image_to_text_is_read_as_text_to_image_with_one_line(tmp_path: Path) -> None:
    config, advice = load_config(write(tmp_path, NINE_KEYS + "task_type: image-to-text\n"))
    assert config.task_type == "text-to-image"
    assert len(advice) == 1


def test_empty_value_means_the_default(tmp_path: Path) -> None:
    config, _ = load_config(write(tmp_path, NINE_KEYS + "optimizer:\nresolution:\n"))
    assert (config.optimizer, config.resolution) == ("adamw", None)


def test_every_setting_is_explained() -> None:
    bare = [name for name, field in RunConfig.model_fields.items() if not field.description]
    assert bare == []


@pytest.mark.parametrize(
    "path",
    sorted(
        set((Path(__file__).parents[2] / "configs").glob("*.yaml"))
        - {Path(__file__).parents[2] / "configs" / "captioner_rules.yaml"}
    ),
    ids=lambda path: path.name,
)
def test_every_template_in_configs_loads(path: Path) -> None:
    load_config(path)


def test_settings_page_holds_every_setting() -> None:
    from lora_scripts.settings_page import settings_markdown

    page = settings_markdown()
    assert all(f"| `{name}` |" in page for name in RunConfig.model_fields)
    assert (Path(__file__).parents[2] / "docs" / "settings.md").read_text("utf-8") == page


def test_plain_values_make_a_run() -> None:
    config, _ = make_config({"train_data_dir": "a", "base_model": "b", "output_dir": "c/d"})
    assert config.name == "d"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("画" * 90, "is too long for a file name"), ("con", "Windows keeps for devices"), ("LPT1.style", "Windows keeps")],
)
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    faults = faults_of(tmp_path, f"{NINE_KEYS}\noutput_name: {name}\n")
    assert len(faults) == 1
    assert reason in faults[0]


def test_home_folder_of_an_unknown_user_is_a_fault_of_its_setting() -> None:
    with pytest.raises(ValueError, match="home folder is not known"):
        RunConfig(train_data_dir="~no-such-user-here/x", base_model="builtin:mini-sd", output_dir=Path("out"))


def test_settings_of_the_other_task_are_named_as_without_effect() -> None:
    base = {"train_data_dir": "d", "base_model": "m", "output_dir": "o"}
    with pytest.raises(ConfigError) as raised:
        make_config({**base, "task_type": "text-generation", "resolution": 512, "trigger_word": "x", "max_length": 9})
    text = str(raised.value)
    assert "resolution: has no effect because task_type is text-generation" in text
    assert "trigger_word: has no effect because task_type is text-generation" in text
    assert "max_length" not in text
    with pytest.raises(ConfigError, match="max_length: has no effect because task_type is text-to-image"):
        make_config({**base, "max_length": 9})
