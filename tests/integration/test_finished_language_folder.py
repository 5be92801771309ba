"""The folder that a run on dialogues leaves, and every way on from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.commands import command, train
from helpers.tiny_causal_lms import save_tiny

if TYPE_CHECKING:
    import pytest


def test_a_finished_folder_says_how_it_was_trained_and_goes_into_every_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    (tmp_path / "data").mkdir()
    rows = [{"input": f"{i} + 1?", "output": f"It is {i + 1}."} for i in range(12)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "task_type": "text-generation",
        "base_model": str(base),
        "train_data_dir": str(tmp_path / "data"),
        "output_dir": str(tmp_path / "out"),
        "output_name": "polite",
        "max_steps": 4,
        "learning_rate": 3e-3,
        "lora_rank": 3,
        "lora_alpha": 4.5,
        "save_precision": "fp32",
    }
    code, _, err = train(values, tmp_path, capsys, options=["--force"])
    assert code == 0, err
    folder = tmp_path / "out" / "polite"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)  # 4.5 is folded in: loaders want a whole number
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert "Assistant: {{ message['content'] }}" in (folder / "chat_template.jinja").read_text()
    for target, output in (("peft", "peft"), ("vllm", "vllm"), ("llamacpp", "a.gguf"), ("mlx", "mlx")):
        words = ("export", "--for", target, "--base-model", base, "--lora", folder, "--output", tmp_path / output)
        code, out, err = command(capsys, *words)
        assert (code, err) == (0, "")
        assert "Prompt of an example: User: My parcel has not arrived. What can I do?\\nAssistant:" in out
        assert float(out.partition("from the trained model ")[2].split()[0]) < 1e-4
    words = ("merge", "--base-model", base, "--lora", folder, "--output", tmp_path / "merged")
    code, out, err = command(capsys, *words)
    assert (code, err) == (0, "")
    assert float(out.partition("from base with LoRA ")[2].split()[0]) < 1e-4
