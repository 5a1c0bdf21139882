"""What a chat template tells texts apart by, read from its source, so that one row of each kind is enough to render.

`{% if '</think>' in content %}` knows texts with and without it, `content[:500]` short and long ones, and of
`content | lower` those in small letters are not changed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import Environment, TemplateSyntaxError, nodes

T = TypeVar("T")
PARSER = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True)
LETTER = re.compile("[A-Za-z]")
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tag, which Jinja does not know."""
SEARCHES = {
    *("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace"),
    *("rfind", "rindex", "rpartition", "rsplit", "split", "startswith"),
}
TRIMS = {"lstrip", "rstrip", "strip", "trim"}
CASES = {"capitalize", "casefold", "lower", "swapcase", "title", "upper"}
ESCAPES = {"e", "escape", "forceescape", "striptags", "urlencode", "urlize", "xmlattr"}
LAYOUTS = {"center": 80, "expandtabs": 8, "indent": 4, "splitlines": 0, "truncate": 255, "wordwrap": 79}
"""What changes spaces and line breaks, and the length that it takes where none is given."""
MARKUP, SPACES = ("<", ">", "&", "'", '"'), ("\n", "\t", "  ")
KEYS = {
    *("audio", "content", "function", "function_call", "image", "image_url", "name", "parameters", "reasoning"),
    *("reasoning_content", "refusal", "role", "text", "thinking", "tool_call_id", "tool_calls", "tool_plan", "type"),
    "video",
}
"""What templates look for in messages and in parts of them, rather than in texts."""


@dataclass(frozen=True)
class Traits:
    """What makes texts differ for a template.

    Args:
        parts: What it looks for in them.
        wholes: What it compares them with.
        lengths: Where it cuts them, or from which lengths on it does otherwise; ascending.
        cases: It changes small letters and capitals.
    """

    parts: tuple[str, ...] = ()
    wholes: frozenset[str] = frozenset()
    lengths: tuple[int, ...] = ()
    cases: bool = False

    @classmethod
    def of(cls, template: str) -> Traits:
        """Those of a chat template; none where it cannot be parsed, and no row can be rendered."""
        try:
            tree = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(
                GENERATION.sub("", template)
            )
        except TemplateSyntaxError:
            return cls()
        compared = list(tree.find_all(nodes.Compare))
        parts = {part for one in compared for part in _sought(one)}
        lengths = {n for one in (*compared, *tree.find_all(nodes.Slice)) for n in _constants(one, int)}
        cases = False
        for name, args in _changes(tree):
            words = {word for arg in args for word in _constants(arg, str)}
            numbers = {number for arg in args for number in _constants(arg, int)}
            cases |= name in CASES
            if name in TRIMS:
                parts |= {letter for word in words for letter in word if not letter.isspace()}
            elif name in SEARCHES and words:
                parts |= words
            elif name in LAYOUTS or name in SEARCHES:
                parts.update(SPACES)
                lengths |= numbers or {LAYOUTS.get(name, 0)}
            elif name in ESCAPES:
                parts.update(MARKUP, SPACES)
        edges = {edge for length in lengths for edge in (abs(length), abs(length) + 1) if edge > 1}
        wholes = frozenset(word for one in compared for word in _constants(one, str))
        return cls(tuple(sorted(parts - KEYS - {""})), wholes, tuple(sorted(edges)), cases)

    def __call__(self, text: str) -> Hashable:
        """What kind of text it is; None: it has nothing that the template looks for."""
        found: list[Hashable] = [_place(part, text) for part in self.parts if part in text]
        if self.cases:
            small = text.islower() or text[1:].islower()
            found.append((small, text[:1].isupper(), text.isupper(), text.istitle(), LETTER.search(text) is None))
        if self.lengths and (size := bisect_right(self.lengths, len(text))):
            found.append(size)
        if text in self.wholes:
            found.append(text)
        return tuple(found) or None


def _place(part: str, text: str) -> Hashable:
    """Whether a text begins or ends with a part, and whether it has a longer one more than once."""
    bare = text.strip()
    many = len(part) > 1 and text.count(part) > 1
    edges = (text.startswith(part), text.endswith(part), bare.startswith(part), bare.endswith(part))
    return part, many, edges


def _constants(node: nodes.Node, kind: type[T]) -> Iterator[T]:
    """The constants of a type in an expression, or which it is."""
    for const in [node] if isinstance(node, nodes.Const) else node.find_all(nodes.Const):
        if type(const.value) is kind:
            yield const.value


def _changes(tree: nodes.Template) -> Iterator[tuple[str, list[nodes.Expr]]]:
    """Each filter and method: its name and arguments."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield call.node.attr, call.args
    for filtered in tree.find_all(nodes.Filter):
        yield filtered.name, filtered.args


def _sought(compared: nodes.Compare) -> set[str]:
    """What a comparison looks for: what is said to be in something, or at its beginning or end."""
    sides = [compared.expr, *(operand.expr for operand in compared.ops)]
    words = {side.value for side in sides if isinstance(side, nodes.Const) and isinstance(side.value, str)}
    if any(operand.op in ("in", "notin") for operand in compared.ops):
        return words
    cut = any(isinstance(side, nodes.Getitem) and not isinstance(side.arg, nodes.Const) for side in sides)
    return {word for word in words if cut or not word.isidentifier()}
