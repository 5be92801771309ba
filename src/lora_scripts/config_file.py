"""From a YAML file and `--set key=value` words to a checked `RunConfig`; all faults at once, with line numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lora_scripts.config import RunConfig
from lora_scripts.errors import ConfigError, did_you_mean

__all__ = ["load_config", "make_config"]

MAX_CONFIG_BYTES = 1_000_000
REQUIRED = ("train_data_dir", "base_model", "output_dir")
"""Of these, `train_data_dir` may be missing where `folders` names the pictures."""
PATHS = {name for name, setting in RunConfig.model_fields.items() if "Path" in str(setting.annotation)}


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases: a flat file needs none, and nested ones can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases (&, *) are not allowed", event.start_mark
            )
        return super().compose_node(parent, index)


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """The run that a YAML file and `key=value` overrides describe, and lines of advice to print.

    Raises:
        ConfigError: the file cannot be read or any setting is wrong; holds every fault with file and line.
    """
    values, lines = _read(path)
    faults = []
    for word in overrides:
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not key:
            faults.append(f"--set {word}: write key=value, for example --set max_steps=20.")
            continue
        try:
            values[key] = yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader
        except (yaml.YAMLError, ValueError, RecursionError):
            values[key] = text  # the setting's own type says what is wrong with it
        lines[key] = 0
    if faults:
        raise ConfigError(faults)
    return make_config(values, str(path), lines)


def make_config(
    values: dict[str, Any], where: str = "settings", lines: dict[str, int] | None = None
) -> tuple[RunConfig, list[str]]:
    """A checked run from plain values, and lines of advice; `lines` gives each key's line in the file (0: --set)."""
    lines = lines or {}
    known = list(RunConfig.model_fields)
    required = [key for key in REQUIRED if key != "train_data_dir" or not values.get("folders")]
    faults = []
    advice = []

    def place(key: str) -> str:
        line = lines.get(key)
        return f"--set {key}" if line == 0 else f"{where} line {line}: {key}" if line else f"{where}: {key}"

    for key in list(values):
        if key not in known:
            faults.append(f"{place(str(key))}: no such setting.{did_you_mean(str(key), known)}")
            del values[key]
        elif values[key] is None and key in required:
            faults.append(f"{place(key)}: is empty.")
            values[key] = "-"
        elif values[key] is None and RunConfig.model_fields[key].default is not None:
            del values[key]  # `key:` with nothing behind it means the default
        elif reason := _unusable_text(key, values[key]):
            faults.append(f"{place(key)}: {reason} (it says {_shorten(values[key])})")
            del values[key]
            if key in required:
                values[key] = "-"
    faults += [f"{where}: {key}: is missing; every run needs it." for key in required if key not in values]
    config = None
    trial = {**values, **{key: "-" for key in required if key not in values}}
    while config is None:
        try:
            config = RunConfig.model_validate(trial)
        except ValidationError as error:
            wrong = set()
            for key, reason in _reasons(error):
                wrong.add(key)
                faults.append(f"{place(key)}: {reason} (it says {_shorten(values.get(key))})")
            for fault in error.errors():
                if not fault["loc"]:
                    for line in str(fault["msg"]).removeprefix("Value error, ").splitlines():
                        key, _, rest = line.partition(": ")
                        faults.append(f"{place(key)}: {rest}" if key in known else line)
            if not wrong:
                break
            # Once more without the wrong values, so that rules between settings are reported in the same go.
            trial = {
                key: "-" if key in wrong else value
                for key, value in trial.items()
                if key not in wrong or key in required
            }
            if "folders" in wrong:
                trial.setdefault("train_data_dir", "-")
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    assert config is not None
    if values.get("task_type") == "image-to-text":
        advice.append(f"{place('task_type')}: image-to-text is read as text-to-image.")
    return config, advice


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's keys and values, and each key's line."""
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file.{did_you_mean(path.name, near)} Templates lie in configs/.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: is {path.stat().st_size:,} bytes; a config has at most {MAX_CONFIG_BYTES:,}.")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = raw.decode("gb18030")
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not a text file in UTF-8. Save it as UTF-8.") from None
    if "\t" in text:
        number = next(i for i, line in enumerate(text.splitlines(), 1) if "\t" in line)
        text = text.replace("\t", "    ") if text.splitlines()[number - 1].lstrip().startswith("#") else text
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise ConfigError(f"{path}: is empty. Templates lie in configs/.")
            if not isinstance(node, yaml.MappingNode):
                raise ConfigError(f"{path}: must be lines of `key: value`. Templates lie in configs/.")
            lines: dict[str, int] = {}
            for key_node, _ in node.value:
                key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in lines:
                    raise ConfigError(f"{path} line {line}: {key}: is set twice, first in line {lines[key]}.")
                lines[key] = line
            values = {str(key): value for key, value in loader.construct_mapping(node, deep=True).items()}
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        hint = ""
        if "\\" in (text.splitlines()[line - 1] if 0 < line <= len(text.splitlines()) else ""):
            hint = ' A Windows path needs single quotes or forward slashes: "D:/pictures".'
        raise ConfigError(f"{path} line {line}: {error.problem or 'is not valid YAML'}.{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML ({str(error).splitlines()[0]}).") from None
    return values, lines


def _unusable_text(key: str, value: Any) -> str:
    """Why no setting can hold these texts; empty when it can. No file name, prompt or header may have such characters."""
    texts = list(_texts(value))
    if any("\0" in text for text in texts):
        return "holds a NUL character"
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError:
        return "holds half of a character (a lone surrogate)"
    try:
        if key in PATHS and isinstance(value, str):
            Path(value).expanduser()
    except RuntimeError:
        return "names a user whose home folder is not known here; write the whole path"
    return ""


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, those in lists and groups of settings too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _reasons(error: ValidationError) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong with its value); of a setting that takes one of several kinds of value, one sentence."""
    kinds: dict[str, list[str]] = {}
    for fault in error.errors():
        # pydantic names the kind of value that it tried, or the place in a list.
        key, *inside = fault["loc"] or [None]
        if key is not None and inside and isinstance(inside[0], str):
            kinds.setdefault(str(key), []).append(_explain(fault))
        elif key is not None:
            # Of a list of groups of settings, where in it: (2, "weight") is the third entry's.
            where, *field = inside or [None]
            entry = f"entry {where + 1}: {field[0]}: " if field and isinstance(where, int) else ""
            yield str(key), entry + _explain(fault)
    for key, sentences in kinds.items():
        yield key, ", or ".join(sentences)


def _explain(fault: Any) -> str:
    """pydantic's reason as a plain sentence."""
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in ("literal_error", "enum"):
        return f"must be one of {context['expected']}"
    if kind == "extra_forbidden":
        return "no such setting"
    if kind == "finite_number":
        return "must be a finite number"
    message = str(fault["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
