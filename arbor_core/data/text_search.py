"""Whether texts and numbers are in what a chat template has rendered, in the ways in which templates write them."""

from __future__ import annotations

import json
import re
from functools import lru_cache

EDGE = 60
"""Longest tag."""
TAG = re.compile(rf"<[^<>\n]{{1,{EDGE}}}>")


@lru_cache(maxsize=16)
def tags_in(template: str) -> re.Pattern[str] | None:
    """Matches the tags that a template names, of a pair at least one, and so may take off a text, or write again in its
    own way."""
    named = {*TAG.findall(template), *re.findall(r"\[/?[A-Z_]+\]", template)}
    others = {tag[0] + tag[2:] if tag[1] == "/" else f"{tag[0]}/{tag[1:]}" for tag in named}
    found = sorted(named | others, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def pieces(text: str, tags: re.Pattern[str] | None) -> list[str]:
    """A text between tags; at least one piece."""
    return [part for part in tags.split(text) if part.strip()] or [text] if tags else [text]


def occurs(text: str, rendered: str) -> bool:
    """Whether a text is found in a rendered one, trimmed or as JSON."""
    bare = text.strip()
    return bare in rendered or any(form in rendered for form in quoted(bare))


def quoted(text: str) -> tuple[str, str]:
    """What is between the quotes of a text as JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def has_number(value: str, text: str, start: int, end: int) -> bool:
    """Whether a number or truth value, as JSON or as Python writes it, is between two positions of a text, and no part
    of a longer word."""
    for form in {value, value.capitalize()} if value.isalpha() else {value}:
        at = text.find(form, start, end)
        while at >= 0:
            before, after = text[max(0, at - 1) : at], text[at + len(form) : at + len(form) + 1]
            if not before.isalnum() and not after.isalnum():
                return True
            at = text.find(form, at + 1, end)
    return False
