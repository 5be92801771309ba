"""The reference of all settings, made from their declarations in `config.py`."""

from __future__ import annotations

from typing import Any

from lora_scripts.config import RunConfig, Section

__all__ = ["describe_settings", "settings_markdown"]


def _groups() -> list[tuple[str, list[str]]]:
    """(group's explanation, its settings), in the order of the declarations."""
    groups = [base for base in RunConfig.__mro__ if issubclass(base, Section) and base is not Section]
    ordered = [groups[0], *reversed(groups[1:])]
    return [((group.__doc__ or "").splitlines()[0], list(group.__annotations__)) for group in ordered]


def _default(name: str) -> str:
    field = RunConfig.model_fields[name]
    if field.is_required():
        return "required"
    value: Any = field.get_default(call_default_factory=True)
    if value is None or value in ([], ""):
        return "-"
    return str(value).lower() if isinstance(value, bool) else str(value)


def describe_settings(word: str = "") -> str:
    """Plain text: every setting whose name holds `word`, with its default and explanation."""
    parts = []
    for title, names in _groups():
        lines = [
            f"  {name}  ({_default(name)})\n      {RunConfig.model_fields[name].description or ''}"
            for name in names
            if word.lower() in name
        ]
        if lines:
            parts.append("\n".join([title, *lines]))
    return "\n\n".join(parts) or f"No setting's name holds {word!r}."


def settings_markdown() -> str:
    """The page docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made from `src/lora_scripts/config.py` by `make docs`; edit the explanations there.",
        "",
    ]
    for title, names in _groups():
        lines += [f"## {title.rstrip('.')}", "", "| setting | default | meaning |", "|---|---|---|"]
        for name in names:
            meaning = (RunConfig.model_fields[name].description or "").replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{name}` | {_default(name)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_markdown(), end="")
