"""The top of the page: what was trained, on what, how long, and how to use it."""

from __future__ import annotations

import math
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING

from lora_scripts.report.charts import count, decimal
from lora_scripts.report.markup import Html, el, zh

if TYPE_CHECKING:
    from lora_scripts.report.facts import ReportFacts
    from lora_scripts.training.record import RunHistory

__all__ = ["headline", "spoken_time"]


def headline(history: RunHistory, report: ReportFacts) -> Html:
    """Name, state, a paragraph in plain language, key figures and the words for the prompt."""
    chinese = _verdict_zh(history, report)
    return el(
        "header",
        el("p", "LoRA training report", zh("训练报告"), class_="over"),
        el("h1", report.name),
        el("p", _badge(history), style="margin:12px 0 0"),
        el("p", _verdict(history, report), class_="verdict"),
        el("p", chinese, class_="verdict-zh", lang="zh") if chinese else None,
        _use(report) if history.finished or report.files else None,
        _figures(history, report),
    )


def spoken_time(seconds: float) -> str:
    """`3 min 12 s`, the two largest units."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    hours = minutes / 60
    if hours < 24:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(hours // 24)} d {int(hours % 24)} h"


def _badge(history: RunHistory) -> Html:
    if history.finished:
        return el("span", "Finished and read back", zh("已完成并校验"), class_="badge good")
    if history.last_step:
        return el("span", f"Stopped at step {count(history.last_step)}", zh("未完成"), class_="badge warn")
    return el("span", "Not started", zh("未开始"), class_="badge warn")


def _verdict(history: RunHistory, report: ReportFacts) -> list[Html | str]:
    if not history.last_step and not report.files:
        return ["No step of this run has been recorded."]
    words: list[Html | str] = [el("b", report.name), " is a LoRA"]
    if base := _base_model(history):
        words += [" for ", el("b", base)]
    words += [", trained"]
    if examples := _num_examples(history, report):
        words += [" on ", el("b", _many(examples, report.words.example))]
    words += [" for ", el("b", _many(history.last_step, "step"))]
    if epochs := _epochs(history):
        words += [f" ({epochs} {'epoch' if epochs == '1' else 'epochs'})"]
    if history.seconds >= 1:
        words += [" in ", el("b", spoken_time(history.seconds))]
    if device := _device(history, report):
        words += [f" on {device}"]
    words += ["."]
    if report.chosen_step is not None and report.chosen_step != history.last_step:
        words += [
            " The file holds the weights of ",
            el("b", f"step {count(report.chosen_step)}"),
            ", the best saved one.",
        ]
    if history.num_parts > 1:
        words += [f" The run was resumed {_times(history.num_parts - 1)}."]
    if history.finished or report.files:
        words += [" ", *report.usage.sentence]
    elif history.checkpoints:
        words += [f" It is not finished: {count(history.last_step)} of {count(history.max_steps)} steps are done, and "]
        words += ["running the same command again goes on from ", el("code", history.checkpoints[-1][1]), "."]
    return words


def _verdict_zh(history: RunHistory, report: ReportFacts) -> str | None:
    if not history.last_step and not report.files:
        return None
    examples = _num_examples(history, report)
    base = _base_model(history)
    words = f"以 {base} 为底模，" if base else ""
    words += f"用 {count(examples)} {report.words.chinese}" if examples else ""
    words += f"训练了 {count(history.last_step)} 步"
    if history.seconds >= 1:
        words += f"，用时 {_chinese_time(history.seconds)}"
    words += "。"
    if report.chosen_step is not None and report.chosen_step != history.last_step:
        words += f"成品取自效果最好的第 {count(report.chosen_step)} 步。"
    if history.finished or report.files:
        words += report.usage.chinese
    return words


def _use(report: ReportFacts) -> Html:
    label, chinese = report.usage.label
    return el("div", el("span", label, zh(chinese)), el("pre", report.usage.line), class_="use")


def _figures(history: RunHistory, report: ReportFacts) -> Html | None:
    tiles: list[tuple[str, str, str, str]] = []
    if examples := _num_examples(history, report):
        left_out = f"{count(len(report.left_out))} left out" if report.left_out else ""
        words = report.words
        tiles.append((words.examples.capitalize(), words.chinese_noun, count(examples), left_out))
    if history.last_step:
        epochs = _epochs(history)
        tiles.append(("Steps", "步数", count(history.last_step), f"{epochs} epochs" if epochs else ""))
    if history.seconds >= 1:
        tiles.append(("Time", "用时", spoken_time(history.seconds), _device(history, report)))
    if rank := history.settings.get("lora_rank"):
        alpha = history.settings.get("lora_alpha")
        tiles.append(("Rank", "秩", str(rank), f"alpha {alpha:g}" if isinstance(alpha, int | float) else ""))
    losses = [each.loss_smoothed for each in history.reports if math.isfinite(each.loss_smoothed)]
    if losses:
        tiles.append(("Loss, smoothed", "损失", decimal(losses[-1]), f"{decimal(losses[0])} at the start"))
    if history.reports:
        memory = max((each.memory for each in history.reports), key=lambda reading: reading.peak_bytes)
        what = "of the process" if memory.source == "process" else "of the GPU"
        tiles.append(
            ("Peak memory", "内存峰值" if memory.source == "process" else "显存峰值", _gib(memory.peak_bytes), what)
        )
    if not tiles:
        return None
    return el(
        "dl",
        (
            el("div", el("dt", label, zh(chinese)), el("dd", value, el("small", small) if small else None))
            for label, chinese, value, small in tiles
        ),
        class_="figures",
    )


def _base_model(history: RunHistory) -> str:
    """The base model without the folders it lies in, which are nobody else's business."""
    base = str(history.settings.get("base_model") or "")
    return base if base.startswith("builtin:") else PureWindowsPath(base).name or base


def _device(history: RunHistory, report: ReportFacts) -> str:
    return report.device or next((value for what, value in history.facts if what.lower() == "device"), "")


def _num_examples(history: RunHistory, report: ReportFacts) -> int:
    return history.num_captions if report.num_examples is None else report.num_examples


def _epochs(history: RunHistory) -> str:
    return f"{history.reports[-1].epoch:.3g}" if history.reports else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.{1 if num_bytes >= 2**30 else 2}f} GiB"


def _many(number: int, what: str) -> str:
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _chinese_time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} 秒"
    minutes = int(seconds // 60)
    return f"{minutes} 分 {int(seconds % 60)} 秒" if minutes < 60 else f"{minutes // 60} 小时 {minutes % 60} 分"
