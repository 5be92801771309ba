"""Running commands as a user does, in this process: the exit code and what stands on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_scripts.cli import main

if TYPE_CHECKING:
    import pytest

Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""


def train(
    values: dict[str, Any] | str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *overrides: str,
    options: Sequence[str] = (),
) -> Answer:
    """`train --config` on these settings (or this text of a config), written to `folder/my.yaml`.

    `overrides` are written `key=value`, `options` as on the command line.

    Whatever is no `LoraScriptsError` passes through and fails the test, as it would show a traceback to a user.
    """
    text = values if isinstance(values, str) else yaml.safe_dump(values, allow_unicode=True)
    (folder / "my.yaml").write_text(text, "utf-8")
    capsys.readouterr()
    words = [word for override in overrides for word in ("--set", override)]
    code = main(["train", "--config", str(folder / "my.yaml"), *words, *options])
    return code, *capsys.readouterr()


def label(folder: Path, model: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """`label` on a folder of pictures with a caption model of this machine."""
    capsys.readouterr()
    code = main(["label", "--input", str(folder), "--model", str(model), "--device", "cpu", *arguments])
    return code, *capsys.readouterr()


def command(capsys: pytest.CaptureFixture[str], *words: object) -> Answer:
    """Any command by its words, numbers and paths among them."""
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()
