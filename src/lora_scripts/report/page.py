"""The whole page in one file: nothing is loaded from anywhere, so it can be mailed, archived and opened offline."""

from __future__ import annotations

import base64
import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lora_scripts import __version__
from lora_scripts.atomic import write_atomically
from lora_scripts.report import samples
from lora_scripts.report import sections as details
from lora_scripts.report.answers import answers_side_by_side
from lora_scripts.report.data_check import data_check
from lora_scripts.report.fitted import worst_fitted
from lora_scripts.report.headline import headline
from lora_scripts.report.markup import Html, el
from lora_scripts.report.style import CSS, SCRIPT

if TYPE_CHECKING:
    from lora_scripts.report.facts import ReportFacts
    from lora_scripts.training.record import RunHistory

__all__ = ["render_report", "write_report"]

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


def write_report(path: Path, history: RunHistory, report: ReportFacts) -> None:
    """Replace `path` by the report of a run, finished or not; sections without data are left out.

    Raises:
        DataError: the file cannot be written.
    """
    write_atomically(path, render_report(history, report))


def render_report(history: RunHistory, report: ReportFacts) -> str:
    """The report as HTML text."""
    sections = [
        ("before-after", "Before and after", samples.before_and_after(history, report.chosen_step)),
        ("answers", "Answers", answers_side_by_side(history.answers, report.chosen_step)),
        ("measured", "Measured effect", samples.measurements(report.measurements)),
        ("previews", "Previews by step", samples.checkpoints_grid(history, report.chosen_step)),
        ("files", "Files", details.files(history, report)),
        ("next", "Next", details.next_steps(report.next_commands)),
        ("curves", "Curves", details.curves(history, report.words)),
        ("worst-fitted", "Worst fitted", worst_fitted(report)),
        ("check", "Data check", data_check(report.check)),
        ("data", "Data", details.data(history, report)),
        ("settings", "Settings", details.settings(history, report)),
        ("notes", "Advice and notes", details.notes(history, report)),
        ("environment", "Environment", details.environment(history, report.environment or _versions())),
    ]
    shown = [section for _, _, section in sections if section is not None]
    links = [el("a", title, href=f"#{anchor}") for anchor, title, section in sections if section is not None]
    started = history.started_at.replace("T", " ")[:16]
    footer = f"Written by lora-scripts {__version__}." + (f" The run began on {started}." if started else "")
    page = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=_policy()),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("meta", name="referrer", content="no-referrer"),
            el("title", f"{report.name} - LoRA training report"),
            el("style", Html(CSS)),
        ),
        el(
            "body",
            el(
                "main",
                headline(history, report),
                el("nav", links, aria_label="Contents") if len(links) > 2 else None,
                shown,
                el("footer", footer),
            ),
        ),
        lang="en",
    )
    # The script stands at the end, so that the page is complete when it runs.
    return f"<!DOCTYPE html>\n{page.removesuffix('</body></html>')}{el('script', Html(SCRIPT))}</body></html>\n"


def _policy() -> str:
    """Nothing from the network, and no script but ours, even if a caption should ever reach the page unescaped."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _versions() -> list[tuple[str, str]]:
    rows = [("lora-scripts", __version__), ("Python", platform.python_version())]
    rows.append(("System", f"{platform.system()} {platform.machine()}".strip()))
    for package in _PACKAGES:
        try:
            rows.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return rows
