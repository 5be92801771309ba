"""What a run tells its listeners, made up: starts, reports, previews."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from lora_scripts.dialogues.answers import Answer
from lora_scripts.training.events import Answers, Listener, Preview, RunStart, StepReport
from lora_scripts.training.memory import MemoryReading


def start(first_step: int = 0, max_steps: int = 40, **changes: Any) -> RunStart:
    values: dict[str, Any] = {
        "settings": {"lora_rank": 8, "learning_rate": 2e-4, "sample_seed": 7, "description": "水墨"},
        "facts": [("base model", "builtin:mini-sd"), ("图片", "24")],
        "captions": [("a.png", "a cat, ink | wash"), ("猫.png", "一只猫")],
    }
    return RunStart(**(values | changes), first_step=first_step, max_steps=max_steps)


def report(step: int, num_steps: int = 10, loss: float = 0.5, **changes: Any) -> StepReport:
    values: dict[str, Any] = {
        "max_steps": 40,
        "epoch": step / 4,
        "losses": [loss + i / 100 for i in range(num_steps)],
        "loss_smoothed": loss,
        "learning_rates": {"unet": 1e-4, "text_encoder": 5e-5},
        "grad_norm": 0.75,
        "rate": 12.5,
        "eta_s": 61.0,
        "memory": MemoryReading(2**30, 3 * 2**30, "process"),
    }
    return StepReport(step=step, **(values | changes))


def preview(step: int, colour: str = "red", prompts: tuple[str, ...] = ("a cat", "一只<猫>")) -> Preview:
    return Preview(step, prompts, [Image.new("RGB", (16, 8), colour) for _ in prompts])


def answers(step: int, *alarms: str) -> Answers:
    """Two prompts; the base model's second answer was cut off."""
    base = [Answer("No idea.", True, 3), Answer("| # | *not* a table", False, 160)]
    adapter = [Answer(f"It arrives\ntoday, dear ({step}).", True, 9), Answer("下午到。", True, 4)]
    return Answers(step, ("Where is it?", "包裹<在哪>？"), base, adapter, alarms, ("Today, dear.", ""))


def short_run(listener: Listener, first_step: int, last_step: int, loss: float = 0.5) -> None:
    """Starts, reports and saves every 10 steps, and closes without being finished."""
    listener.started(start(first_step))
    if first_step == 0:
        listener.previewed(preview(0))
    for step in range(first_step + 1, last_step + 1):
        listener.ticked(step)
        if step % 10 == 0:
            listener.stepped(report(step, loss=loss))
            listener.saved(step, Path(f"out/checkpoint-{step}"))
            listener.previewed(preview(step))
    listener.close()
