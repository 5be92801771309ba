"""Rules that turn a model's sentence into a prompt: small steps with a name each, in a fixed order.

A rule never sees the picture. What each step did to a caption can be shown, and the steps can be run again on captions that
were written before, without the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_scripts.errors import ConfigError, did_you_mean

__all__ = ["Rules", "Step", "load_rules"]

MAX_RULES_BYTES = 1_000_000

OPENERS = (
    "this is",
    "there is",
    "there are",
    "here is",
    "here are",
    "we see",
    "we can see",
    "(?:an?|the|this) (?:close[ -]?up )?(?:picture|image|photo|photograph|drawing|painting|illustration|view|scene) (?:of|shows|showing|depicts|depicting)",
    "(?:picture|image|photo|photograph) of",
    "an? close[ -]?up (?:of|view of)",
)
"""Phrases that say that a picture is a picture. With a style to be learned, `a painting of` would tie the style to those words."""

ARTEFACTS = ("arafed", "araffe", "araffes", "arafe", "araffy", "arafa")
"""Words that exist in no language but that BLIP large writes into many captions."""


@dataclass(frozen=True)
class Step:
    """One rule at work: its name, and the text before to the text after."""

    name: str
    apply: Callable[[str], str]


@dataclass(frozen=True)
class Rules:
    """Settings of all steps; what is empty or false does nothing.

    Attributes:
        trigger: the word that will call the style or subject; stands first, once.
        prefix, suffix: put before and after every caption, behind the trigger.
        ban: words or phrases that are taken out.
        replace: word or phrase -> what stands in its place.
        vocabulary: term -> other names for the same thing, which all become that term.
        strip_openers: take away "a picture of", "there is", ...
        lowercase: write everything in small letters.
    """

    trigger: str = ""
    prefix: str = ""
    suffix: str = ""
    ban: tuple[str, ...] = ()
    replace: Mapping[str, str] = field(default_factory=dict)
    vocabulary: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    strip_openers: bool = True
    lowercase: bool = False

    def apply(self, caption: str) -> str:
        """The prompt made of a caption."""
        for step in self.steps:
            caption = step.apply(caption)
        return caption

    def explain(self, caption: str) -> list[tuple[str, str]]:
        """(step, text after it) for each step that changed something."""
        changes = []
        for step in self.steps:
            after = step.apply(caption)
            if after != caption:
                changes.append((step.name, after))
            caption = after
        return changes

    @cached_property
    def steps(self) -> Sequence[Step]:
        """The steps in force, in order. The trigger comes last, so that nothing removes it or moves in front of it."""
        steps = [Step("tidy", tidy), Step("artefacts", _remover(ARTEFACTS))]
        if self.strip_openers:
            steps.append(Step("openers", strip_openers))
        steps.append(Step("repeats", drop_repeats))
        if self.lowercase:
            steps.append(Step("lowercase", str.lower))
        swaps = {other: term for term, others in self.vocabulary.items() for other in others}
        if swaps:
            steps.append(Step("vocabulary", _replacer(swaps)))
        if self.replace:
            steps.append(Step("replace", _replacer(self.replace)))
        if self.ban:
            steps.append(Step("ban", _remover(self.ban)))
        steps.append(Step("final stop", drop_final_stop))
        if self.prefix or self.suffix:
            steps.append(Step("prefix and suffix", self._wrap))
        if self.trigger:
            steps.append(Step("trigger first", self._trigger_first))
        return steps

    def _wrap(self, text: str) -> str:
        parts = [self.prefix.strip(" ,"), text, self.suffix.strip(" ,")]
        return ", ".join(part for part in parts if part)

    def _trigger_first(self, text: str) -> str:
        folded = self.trigger.casefold()
        if re.match(rf"{re.escape(folded)}(?:\W|$)", text.casefold()):
            return self.trigger + text[len(self.trigger) :]
        # A part of its own is moved; inside a sentence the word stays, for taking it out would leave a broken sentence.
        parts = [part for part in text.split(", ") if part and part.casefold() != folded]
        return ", ".join([self.trigger, *parts])


def tidy(text: str) -> str:
    """One line, single blanks, no blank before a comma or an apostrophe, no empty parts between commas."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"(\w) ' (s|t|re|ve|ll|d|m)\b", r"\1'\2", text)
    text = re.sub(r"(?:,\s*){2,}", ", ", text)
    text = re.sub(r",\s*([.;!?])", r"\1", text)
    return text.strip(" ,")


def strip_openers(text: str) -> str:
    """The text without phrases at its start that only say that there is a picture; some models stack several."""
    while match := _OPENER.match(text):
        rest = text[match.end() :]
        if not rest:
            break
        text = rest
    return text


_OPENER = re.compile(rf"\s*(?:{'|'.join(OPENERS)})\s+(?=\S)", re.IGNORECASE)


def drop_repeats(text: str) -> str:
    """The text with words and phrases said once that stand twice or more in a row; parts of a comma list count once."""
    # Up to six words: "with a hat with a hat" is what a captioner in a loop writes.
    for length in range(6, 0, -1):
        phrase = rf"\b(\w+(?:[ ]\w+){{{length - 1}}})"
        text = re.sub(rf"{phrase}(?:,?[ ](?:and[ ])?\1\b)+", r"\1", text, flags=re.IGNORECASE)
    parts = text.split(", ")
    return ", ".join(dict.fromkeys(parts)) if len(parts) > 2 else text


def drop_final_stop(text: str) -> str:
    """The text without a full stop, comma or semicolon at its end; an ellipsis or question mark stays."""
    return text[:-1].rstrip(" ,") if text.endswith((".", ",", ";")) and not text.endswith("..") else text


def _pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Any of the phrases as whole words, longest first, in any case. Chinese has no word borders, so none are asked for."""
    parts = []
    for phrase in sorted(phrases, key=len, reverse=True):
        words = r"\s+".join(re.escape(word) for word in phrase.split())
        left = r"(?<![A-Za-z0-9_-])" if re.match(r"[A-Za-z0-9_]", phrase) else ""
        right = r"(?![A-Za-z0-9_-])" if re.search(r"[A-Za-z0-9_]$", phrase) else ""
        parts.append(f"{left}{words}{right}")
    return re.compile("|".join(parts), re.IGNORECASE)


def _remover(phrases: Sequence[str]) -> Callable[[str], str]:
    pattern = _pattern(phrases)
    return lambda text: tidy(pattern.sub("", text)) if pattern.search(text) else text


def _replacer(swaps: Mapping[str, str]) -> Callable[[str], str]:
    pattern = _pattern(list(swaps))
    folded = {" ".join(old.lower().split()): new for old, new in swaps.items()}
    return lambda text: pattern.sub(lambda match: folded[" ".join(match[0].lower().split())], text)


def load_rules(path: Path | None, overrides: Mapping[str, Any]) -> Rules:
    """Rules from a YAML file, with what was given on the command line on top.

    Args:
        overrides: by the name of the setting; None leaves the file's value. Lists and mappings are added to the file's.
    Raises:
        ConfigError: the file is not there, is no YAML mapping, or has unknown or wrong settings; all told at once.
    """
    rules = Rules() if path is None else _from_file(path)
    for name, value in overrides.items():
        if value is None:
            continue
        present = getattr(rules, name)
        if isinstance(present, tuple) and isinstance(value, (list, tuple)):
            value = (*present, *value)
        elif isinstance(present, Mapping) and isinstance(value, Mapping):
            value = {**present, **value}
        rules = replace(rules, **{name: value})
    empty = [
        name for name in ("ban", "replace", "vocabulary") if any(not str(key).strip() for key in getattr(rules, name))
    ]
    if empty:
        raise ConfigError([f"rules: {name}: an empty word matches everywhere. Take it out." for name in empty])
    return rules


def _from_file(path: Path) -> Rules:
    import yaml

    try:
        if path.stat().st_size > MAX_RULES_BYTES:
            raise ConfigError(f"{path}: is larger than 1 MB. Is it a rules file?")
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such rules file. See configs/captioner_rules.yaml for a template.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__}).") from None
    try:
        # A few nested aliases can stand for gigabytes; rules have no use for them.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError(f"{path}: YAML aliases (*name) are not allowed in rules. Write the value out.")
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: is no valid YAML ({getattr(error, 'problem', None) or error}).") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply to be a rules file.") from None
    if values is None:
        return Rules()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: should hold settings such as `trigger: mystyle`. See configs/captioner_rules.yaml.")
    return _checked(path, values)


def _checked(path: Path, values: Mapping[object, object]) -> Rules:
    names = [item.name for item in fields(Rules)]
    faults: list[str] = []
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if name not in names:
            faults.append(f"{path}: {name}: no such rule.{did_you_mean(name, names)} There are: {', '.join(names)}.")
            continue
        try:
            settings[name] = _convert(name, value)
        except ValueError as error:
            faults.append(f"{path}: {name}: {error}")
    if faults:
        raise ConfigError(faults)
    return replace(Rules(), **settings)


def _convert(name: str, value: Any) -> object:
    def words(entries: Any) -> tuple[str, ...]:
        entries = [entries] if isinstance(entries, (str, int, float)) else entries
        if not isinstance(entries, list) or not all(isinstance(entry, (str, int, float)) for entry in entries):
            raise ValueError("should be a list of words")
        return tuple(str(entry) for entry in entries)

    if name in ("strip_openers", "lowercase"):
        if not isinstance(value, bool):
            raise ValueError("should be true or false")
        return value
    if name == "ban":
        return words(value or [])
    if name in ("replace", "vocabulary"):
        if not isinstance(value or {}, dict):
            raise ValueError(
                "should be a list of lines such as `old: new`"
                if name == "replace"
                else "should be a list of lines such as `term: [other, names]`"
            )
        pairs = dict(value or {})
        if name == "vocabulary":
            return {str(term): words(others) for term, others in pairs.items()}
        if not all(isinstance(new, (str, int, float, type(None))) for new in pairs.values()):
            raise ValueError("should have one word or phrase after each colon")
        return {str(old): "" if new is None else str(new) for old, new in pairs.items()}
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError("should be a text")
    return str(value)
