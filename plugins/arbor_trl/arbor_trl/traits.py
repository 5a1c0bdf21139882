"""What a chat template tells texts apart by, read from its source, so that one row of each kind is enough to render.

`{% if '</think>' in content %}` knows texts with and without it, `content[:500]` short and long ones, and of
`content | lower` those in small letters are not changed.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from jinja2 import Environment, TemplateSyntaxError, nodes

T = TypeVar("T")
N = TypeVar("N", bound=nodes.Node)
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
    *("audio", "content", "description", "enum", "function", "function_call", "image", "image_url", "items", "name"),
    *("nullable", "parameters", "properties", "reasoning", "reasoning_content", "refusal", "required", "role", "text"),
    *("thinking", "tool_call_id", "tool_calls", "tool_plan", "type", "video"),
}
"""What templates look for in messages, their parts and tools, rather than in texts."""


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
    def of(cls, template: str | Mapping[str, str]) -> Traits:
        """Those of a chat template, or of several by name; none where it cannot be parsed, and no row be rendered."""
        source = template if isinstance(template, str) else "\n".join(template.values())
        try:
            tree = PARSER.parse(GENERATION.sub("", source))
        except TemplateSyntaxError:
            return cls()
        compared, held = list(tree.find_all(nodes.Compare)), _held(tree)
        parts = {part for one in compared for part in _sought(one, held)}
        lengths = {n for one in (*compared, *tree.find_all(nodes.Slice)) for n in _constants(one, int, held)}
        cases = False
        for name, args in _changes(tree):
            words = {word for arg in args for word in _constants(arg, str, held)}
            numbers = {number for arg in args for number in _constants(arg, int, held)}
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
        wholes = frozenset(word for one in compared for word in _constants(one, str, held))
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


def _held(tree: nodes.Template) -> list[nodes.Const]:
    """The constants that variables hold, also one after the other."""
    values: list[nodes.Node] = [each.node for each in tree.find_all(nodes.Assign)]
    values += [each.iter for each in tree.find_all(nodes.For)]
    plain = [value for value in values if isinstance(value, nodes.Const | nodes.List | nodes.Tuple)]
    return [const for value in plain for const in _within(value, nodes.Const)]


def _constants(node: nodes.Node, kind: type[T], held: Iterable[nodes.Const]) -> Iterator[T]:
    """The constants of a type in an expression; where there are variables in it, all that any of these holds."""
    consts = _within(node, nodes.Const)
    for const in (*consts, *held) if _within(node, nodes.Name) else consts:
        if type(const.value) is kind:
            yield const.value


def _within(node: nodes.Node, kind: type[N]) -> list[N]:
    """The nodes of a kind in an expression, which it may be itself."""
    return [node] if isinstance(node, kind) else list(node.find_all(kind))


def _changes(tree: nodes.Template) -> Iterator[tuple[str, list[nodes.Expr]]]:
    """Each filter and method: its name and arguments."""
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr):
            yield call.node.attr, [*call.args, *(each.value for each in call.kwargs)]
    for filtered in tree.find_all(nodes.Filter):
        yield filtered.name, [*filtered.args, *(each.value for each in filtered.kwargs)]


def _sought(compared: nodes.Compare, held: Iterable[nodes.Const]) -> set[str]:
    """What a comparison looks for: what is said to be in something, or at its beginning or end."""
    sides = [compared.expr, *(operand.expr for operand in compared.ops)]
    if any(operand.op in ("in", "notin") for operand in compared.ops):
        plain = [side for side in sides if isinstance(side, nodes.Const | nodes.Name)]
        return {word for side in plain for word in _constants(side, str, held)}
    words = {side.value for side in sides if isinstance(side, nodes.Const) and isinstance(side.value, str)}
    cut = any(isinstance(side, nodes.Getitem) and not isinstance(side.arg, nodes.Const) for side in sides)
    return {word for word in words if cut or not word.isidentifier()}
