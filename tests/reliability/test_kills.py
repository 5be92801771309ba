"""A run that is killed again and again ends in the very file of a run that was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("LORA_SCRIPTS_KILLS", "50"))


SOME_KILLS = max(1, KILLS // 3)
PICTURES_IMPORT = [
    "lora_scripts.export.sidecar", "lora_scripts.families.sd15", "lora_scripts.tasks.text_to_image",
    "transformers.models.clip.modeling_clip", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
]  # fmt: skip
DIALOGUES_IMPORT = [
    "lora_scripts.answering.previews", "lora_scripts.families.causal_lm", "lora_scripts.tasks.text_generation",
    "transformers.models.llama.modeling_llama", "transformers.generation.utils",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(26)
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_run_killed_at_random_moments_ends_in_the_same_bytes(settings: Callable[..., Any], tmp_path: Path) -> None:
    unbroken = settings(
        output_dir=str(tmp_path / "unbroken" / "run"),
        max_steps=40,
        save_steps=1,
        keep_checkpoints=2,
        lora_dropout=0.1,
        caption_dropout=0.2,
        flip=True,
        save_precision="fp32",
    )
    previews = {"sample_every": 3, "sample_prompts": ["a red cat"], "sample_steps": 1}
    free_changes = [{}, {"num_workers": 1}, {"num_workers": 3}, previews, previews | {"num_workers": 2}]
    killed_and_compared(tmp_path, unbroken, free_changes, KILLS, PICTURES_IMPORT, "run.safetensors")


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(26)
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_language_run_killed_at_random_moments_ends_in_the_same_bytes(
    language_settings: Callable[..., Any], tmp_path: Path
) -> None:
    unbroken = language_settings(
        output_dir=str(tmp_path / "unbroken" / "run"),
        max_steps=40,
        save_steps=1,
        keep_checkpoints=2,
        lora_dropout=0.1,
        save_precision="fp32",
    )
    answers = {"sample_every": 3, "sample_prompts": ["2 and 2?"], "sample_tokens": 4}
    killed_and_compared(
        tmp_path, unbroken, [{}, answers], SOME_KILLS, DIALOGUES_IMPORT, "run/adapter_model.safetensors"
    )


def killed_and_compared(
    folder: Path,
    unbroken: dict[str, Any],
    free_changes: list[dict[str, Any]],
    kills: int,
    imported: list[str],
    file: str,
) -> None:
    """Kills runs until `kills` have been counted and the last one is finished; all their files equal the unbroken one's.

    Args:
        free_changes: settings that may differ from life to life.
        imported: modules that need not be imported anew in every life.
        file: the finished one, within the output folder.
    """
    plan = {
        "unbroken": unbroken,
        "free_changes": free_changes,
        "folder": str(folder / "killed"),
        "log": str(folder / "lives.log"),
        "kills": kills,
        "life": 0.4,
        "seed": 7,
        "imported": imported,
        "file": file,
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attempts.py")), str(folder / "plan.json")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    assert "failed" not in told, f"{told}\n{(folder / 'lives.log').read_text('utf-8', 'replace')[-3000:]}"
    print(told)
    assert told["kills"] == kills
    assert told["while saving"] > 0
    output_dirs = [Path(finished.removesuffix(file)) for finished in told["finished"]]
    expected = (Path(unbroken["output_dir"]) / file).read_bytes()
    for output_dir in output_dirs:
        assert (output_dir / file).read_bytes() == expected, output_dir
        left = {path.name for path in output_dir.iterdir()}
        assert not {name for name in left if name.endswith((".partial", ".tmp"))}, left
        for line in (output_dir / "record.jsonl").read_text("utf-8").splitlines():
            assert line == "" or json.loads(line)
