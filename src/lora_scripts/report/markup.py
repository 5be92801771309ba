"""HTML put together from elements, so that nothing a user wrote can become markup.

Text becomes `Html` only by being escaped; joining `Html` with plain text by `+` or in an f-string gives plain text,
which is escaped again, so a mistake shows up as visible tags rather than as a hole.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

__all__ = ["Child", "Html", "el", "join", "sentence", "text", "zh"]

_VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
_NOT_IN_HTML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup that is safe to put on the page."""

    __slots__ = ()


Child = Html | str | int | float | None | Iterable["Child"]


def text(value: object) -> Html:
    """The value as visible text; characters that a page cannot hold become U+FFFD."""
    return Html(html.escape(_NOT_IN_HTML.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True))


def join(*children: Child) -> Html:
    """The children one after the other; plain text is escaped, None is left out."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(text(child))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """One element. `class_` is written `class`, `data_x` is written `data-x`; None and False leave an attribute out."""
    words = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        words.append(name if value is True else f'{name}="{text(value)}"')
    opening = f"<{' '.join(words)}>"
    if tag in _VOID:
        assert not children, f"{tag} holds nothing"
        return Html(opening)
    return Html(f"{opening}{join(*children)}</{tag}>")


def zh(words: str) -> Html:
    """A Chinese second heading."""
    return el("span", words, lang="zh", class_="zh")


def sentence(words: str) -> str:
    """The words with a capital at the front, unless they begin with the name of a setting."""
    first = words.split(" ", 1)[0]
    return words if "_" in first or first.endswith(":") else words[:1].upper() + words[1:]
