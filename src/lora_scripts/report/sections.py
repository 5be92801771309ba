"""The rest of the page: curves, data, settings, files, notes and environment."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_scripts.report.charts import Series, count, decimal, line_chart, power
from lora_scripts.report.choice import step_table
from lora_scripts.report.data_check import told_by_check
from lora_scripts.report.markup import Child, Html, el, sentence, zh
from lora_scripts.report.parts import lines, more, section, table, thumbnail
from lora_scripts.run_rules import FOR_OTHER_TASKS

if TYPE_CHECKING:
    from lora_scripts.report.facts import FolderRow, ReportFacts
    from lora_scripts.training.record import RunHistory
    from lora_scripts.words import Words

__all__ = ["curves", "data", "environment", "files", "next_steps", "notes", "settings"]

_MAX_THUMBNAILS = 60
_MAX_LEFT_OUT = 200
_MAX_NOTES = 100


def _memorising(words: Words) -> str:
    return (
        f" The validation loss is measured {words.measured} every time: held-out loss that rises while that of training "
        f"{words.examples} falls means that {words.examples} are learnt by heart."
    )


def curves(history: RunHistory, words: Words) -> Html | None:
    """Loss, learning rate, gradient norm, speed and memory over the steps."""
    reports, measured = history.reports, history.validations
    at = [report.step for report in reports]
    marks = [(float(step), "checkpoints") for step, _ in history.checkpoints]
    groups = list(dict.fromkeys(group for report in reports for group in report.learning_rates))
    limit = history.settings.get("max_grad_norm")
    looks = ["line", "second", "faint"]
    charts = [
        line_chart(
            "Loss",
            "损失",
            [
                Series("each step", history.steps, history.losses, "faint"),
                Series("smoothed", at, [report.loss_smoothed for report in reports]),
            ],
            decimal,
            marks=marks,
            wide=True,
        )
        if reports
        else None,
        line_chart(
            "Validation loss",
            "验证损失",
            [
                Series(
                    f"training {words.examples}",
                    [v.step for v in measured],
                    [v.training_loss for v in measured],
                    "second",
                ),
                Series(f"held-out {words.examples}", [v.step for v in measured], [v.loss for v in measured]),
            ],
            decimal,
            marks=marks,
            wide=True,
        )
        if measured
        else None,
        line_chart(
            "Memorisation",
            "记忆程度",
            [Series("held-out minus training", [v.step for v in measured], [v.gap for v in measured])],
            decimal,
        )
        if measured
        else None,
        line_chart(
            "Learning rate",
            "学习率",
            [
                Series(group, at, [report.learning_rates.get(group, float("nan")) for report in reports], look)
                for group, look in zip(groups, looks, strict=False)
            ],
            power,
        )
        if groups
        else None,
        line_chart(
            "Gradient norm",
            "梯度范数",
            [Series("gradient norm", at, [report.grad_norm for report in reports])],
            decimal,
            limit=(float(limit), "shortened above this") if isinstance(limit, int | float) and limit > 0 else None,
        ),
        line_chart(
            "Speed",
            "速度",
            [Series(f"{words.unit}s per second", at, [report.rate for report in reports])],
            decimal,
            f"{words.unit}s/s",
            from_zero=True,
        ),
        line_chart(
            "Memory",
            "内存" if reports and reports[-1].memory.source == "process" else "显存",
            [
                Series("peak", at, [report.memory.peak_bytes / 2**30 for report in reports], "second"),
                Series("in use", at, [report.memory.current_bytes / 2**30 for report in reports]),
            ],
            decimal,
            "GiB",
            from_zero=True,
        ),
    ]
    if not any(charts):
        return None
    return section(
        "curves",
        "Curves",
        "训练曲线",
        el("div", charts, class_="charts"),
        lead=f"The loss of single steps jumps because {words.loss_varies}; the smoothed curve shows the trend."
        + (_memorising(words) if measured else ""),
    )


def data(history: RunHistory, report: ReportFacts) -> Html | None:
    """What trained and what did not, the shapes, and the captions."""
    parts: list[Child] = []
    words = report.words
    num_examples = history.num_captions if report.num_examples is None else report.num_examples
    if report.left_out:
        rows = [[name, reason] for name, reason in report.left_out[:_MAX_LEFT_OUT]]
        parts.append(el("h3", f"Left out: {count(len(report.left_out))}", zh("未参与训练")))
        parts.append(table([words.example.capitalize(), "Reason"], rows))
        parts.append(more(len(report.left_out) - len(rows)))
    if report.folders:
        parts += [el("h3", "Folders", zh("文件夹")), _folders(report.folders)]
    if report.bucket_counts:
        parts += [el("h3", "Shapes", zh("尺寸分组")), _buckets(report.bucket_counts)]
    thumbnails = report.thumbnails[:_MAX_THUMBNAILS]
    total = max(num_examples, len(report.thumbnails))
    if thumbnails:
        parts.append(el("h3", "Pictures and captions", zh("图片与标注")))
        parts.append(el("div", (thumbnail(each) for each in thumbnails), class_="data"))
        parts.append(more(total - len(thumbnails)))
    elif history.captions:
        rows = [list(pair) for pair in history.captions[:_MAX_THUMBNAILS]]
        parts.append(el("h3", f"{words.says.capitalize()}s", zh(words.chinese_says)))
        parts.append(table([words.example.capitalize(), words.says.capitalize()], rows))
        parts.append(more(history.num_captions - len(rows)))
    if not parts:
        return None
    lead = f"{count(num_examples)} trained" if num_examples else ""
    if lead and report.left_out:
        lead += f", {count(len(report.left_out))} left out"
    return section("data", "Data", "训练数据", *parts, lead=f"{lead}." if lead else "")


def _folders(folders: Sequence[FolderRow]) -> Html:
    rows = [
        [
            row.name,
            "regularization" if row.regularization else "to be learnt",
            count(row.pictures),
            count(round(row.uses)),
            row.trigger or "-",
            f"{row.weight:g}",
        ]
        for row in folders
    ]
    return table(["Folder", "For", "Pictures", "Uses per epoch", "Trigger word", "Weight in the loss"], rows)


def _buckets(counts: Mapping[str, int]) -> Html:
    most = max(counts.values())
    return el(
        "div",
        (
            [
                el("span", size.replace("x", " × "), class_="mono"),
                el("div", el("div", class_="fill", style=f"width:{number / most:.1%}"), class_="track"),
                el("span", count(number)),
            ]
            for size, number in sorted(counts.items(), key=lambda item: -item[1])
        ),
        class_="buckets",
    )


def settings(history: RunHistory, report: ReportFacts) -> Html | None:
    """What the user set for this run, and behind a click everything in force with its explanation."""
    inert = FOR_OTHER_TASKS.get(str(history.settings.get("task_type")), frozenset())
    values = {key: value for key, value in history.settings.items() if key not in inert}
    if not values:
        return None
    fields = _fields()
    changed = {key for key in values if key in fields and _differs(values[key], fields[key])}
    written = changed if report.written_settings is None else {key for key in report.written_settings if key in values}
    heads = el("thead", el("tr", (el("th", head) for head in ("Setting", "Value", "Default"))))
    own = [
        el(
            "tr",
            _setting(key, value),
            el("td", _default(fields.get(key)), class_="soft default"),
            class_=_look(key, changed),
        )
        for key, value in values.items()
        if key in written
    ]
    everything: list[Html] = []
    group = ""
    order = list(fields)
    for key in sorted(values, key=lambda key: order.index(key) if key in fields else len(order)):
        title = fields[key]["group"] if key in fields else "Other"
        if title != group:
            group = title
            everything.append(el("tr", el("td", title, colspan=3), class_="group"))
        why = el("td", fields[key]["explanation"] if key in fields else "", class_="why")
        everything.append(el("tr", _setting(key, values[key]), why, class_=_look(key, changed)))
    return section(
        "settings",
        "Settings",
        "训练设置",
        el("table", heads, el("tbody", own), class_="list settings") if own else None,
        el(
            "details",
            el("summary", f"All {len(values)} settings with explanations", zh("全部设置")),
            el("table", el("tbody", everything), class_="list settings"),
        ),
        lead="What was set for this run; marked where it differs from the default."
        if own
        else "All at their defaults.",
    )


def _look(key: str, changed: Collection[str]) -> str | None:
    return "changed" if key in changed else None


def _setting(key: str, value: object) -> list[Html]:
    return [el("td", el("code", key)), el("td", el("code", _shown(value)))]


def _fields() -> dict[str, dict[str, Any]]:
    """Every known setting's group, explanation and default, in the order of the configuration's own pages."""
    from lora_scripts.config import RunConfig

    fields: dict[str, dict[str, Any]] = {}
    for group in reversed(RunConfig.__mro__):
        names = [name for name in vars(group).get("__annotations__", {}) if name in RunConfig.model_fields]
        for name in names:
            field = RunConfig.model_fields[name]
            title = (group.__doc__ or group.__name__).splitlines()[0].split(";")[0].rstrip(".")
            fields[name] = {
                "group": title,
                "explanation": (field.description or "").replace("`", ""),
                "required": field.is_required(),
                "default": None if field.is_required() else field.get_default(call_default_factory=True),
            }
    return fields


def _differs(value: object, field: Mapping[str, Any]) -> bool:
    """Whether the user must have chosen the value; what has no default value is often filled in by the run itself."""
    return field["default"] is not None and _shown(value) != _shown(field["default"])


def _default(field: Mapping[str, Any] | None) -> Html | str:
    if field is None or field["default"] is None:
        return "required" if field is not None and field["required"] else "-"
    return el("code", _shown(field["default"]))


def _shown(value: object) -> str:
    """A value as one would write it in the YAML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str | Path):
        return str(value) or '""'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(part) for part in value) + "]"
    return json.dumps(value, ensure_ascii=False, default=str)


def files(history: RunHistory, report: ReportFacts) -> Html | None:
    """The finished files with their sizes, and where each tool looks for them."""
    paths = list(report.files or history.files)
    parts: list[Child] = []
    if paths:
        parts.append(el("ul", (_file(path, report.usage.purpose(path)) for path in paths), class_="files"))
        if any(path.suffix == ".safetensors" for path in paths):
            rows = [list(place) for place in report.usage.places]
            parts += [el("h3", "Where to put it", zh("放置位置")), table(["Tool", "Place"], rows)]
    if report.chosen_why:
        parts += [el("h3", "Why this step", zh("为何选这一步")), el("p", report.chosen_why), step_table(report)]
    if report.verification:
        parts += [el("h3", "What was checked", zh("校验结果")), lines(report.verification, "good")]
    return section("files", "Files", "输出文件", *parts) if parts else None


def _file(path: Path, purpose: str) -> Html:
    name = el("div", el("code", path.name), el("span", _size(path)))
    return el("li", name, el("p", purpose) if purpose else None)


def _size(path: Path) -> str:
    try:
        num_bytes = sum(each.stat().st_size for each in (path.iterdir() if path.is_dir() else [path]))
    except OSError:
        return "-"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def notes(history: RunHistory, report: ReportFacts) -> Html | None:
    """Advice for the next run, and what the run itself warned of."""
    known = told_by_check(report.check)
    warnings = list(dict.fromkeys(n.text for n in history.notes if n.level == "warning" and n.text not in known))
    said = [note.text for note in history.notes if note.level == "info"]
    parts: list[Child] = []
    if report.advice:
        parts += [el("h3", "For the next run", zh("下次训练建议")), lines([sentence(line) for line in report.advice])]
    if warnings:
        parts += [
            el("h3", "Warnings", zh("警告")),
            lines(warnings[:_MAX_NOTES], "warn"),
            more(len(warnings) - _MAX_NOTES),
        ]
    if said:
        log = "\n".join(said[-_MAX_NOTES:])
        parts.append(el("details", el("summary", "What the run said", zh("运行日志")), el("pre", log)))
    return section("notes", "Advice and notes", "建议与提示", *parts) if parts else None


def next_steps(commands: Sequence[tuple[str, str]]) -> Html | None:
    """Commands to go on with."""
    if not commands:
        return None
    return section(
        "next",
        "Next",
        "下一步",
        *(el("div", el("p", sentence(what)), el("pre", command), class_="command") for what, command in commands),
    )


def environment(history: RunHistory, rows: Sequence[tuple[str, str]]) -> Html | None:
    """The run's facts and the versions of what it ran on."""
    known = dict.fromkeys([*history.facts, *rows])
    if not known:
        return None
    return section("environment", "Run and environment", "运行环境", table([], [list(row) for row in known]))
