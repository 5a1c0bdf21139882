"""Texts that a chat template tells apart are not of one kind, whatever it looks for."""

from __future__ import annotations

from typing import Any

import pytest
import trl_templates as t
from arbor_sft.tiny import tokenizer
from arbor_trl.chat import ChatFormat
from arbor_trl.row_check import RowCheck
from arbor_trl.traits import Traits

TESTS = {
    "'tool' not in m.content": ("no such word", "a tool"),
    "not m.content.startswith('Error')": ("An Error", "Error: none"),
    "m.content[:2] != '{\"'": ('a {"b": 1}', '{"b": 1}'),
    "m.content[0] != '#'": ("one # two", "# one"),
    "m.content != 'None'": ("None of it", "None"),
    "m.content | length < 90": ("short", "l" + "o" * 88 + "ng"),
    "m.content.split('##') | length < 3": ("a ## b", "a ## b ## c"),
}
WRITES = {
    "m.content.split('</think>')[-1]": ("It is 18.", "It is </think> 18."),
    "m.content[:80]": ("short", "l" + "o" * 88 + "ng"),
    "m.content | replace('secret', '')": ("It is.", "It is secret here."),
    "m.content | truncate(80)": ("short", "l" + "o" * 88 + "ng"),
    "m.content | lower": ("it is", "it Is it"),
    "m.content | upper": ("IT IS", "IT Is IT"),
    "m.content | striptags": ("It is", "It < is >"),
    "m.content | e": ("It is", "It & is"),
    "m.content.split() | join(' ')": ("It is", "It\nis"),
    "m.content | truncate(length=80)": ("short", "l" + "o" * 88 + "ng"),
    "m.content | replace(hidden, '')": ("It is.", "It is secret here."),
    "m.content.strip('*')": ("It is **so**.", "**It** is **so**"),
}
TEMPLATES = {test: f"{{% if {test} %}}{{{{ m.content }}}}{{% endif %}}" for test in TESTS} | {
    written: f"{{{{ {written} }}}}" for written in WRITES
}
PAIRS = TESTS | WRITES


def row(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_lost_of_some_texts_is_found_before_training(name: str) -> None:
    """Though a row that differs in nothing but its words was taken before."""
    found = tokenizer()
    found.chat_template = "{% set hidden = 'secret' %}" + t.CHATML.replace("{{ m.content }}", TEMPLATES[name])
    check = RowCheck(ChatFormat(found))
    whole, lost = PAIRS[name]
    assert list(check(row(whole))) == []
    with pytest.raises(ValueError, match=r"template (leaves out|changes) messages\[1\]\.content$"):
        check(row(lost))


def test_texts_without_what_is_looked_for_are_of_one_kind() -> None:
    traits = Traits.of(t.CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1][:50] }}"))
    assert traits("It is 18.") is None
    assert traits("It is 18. " * 9) == traits("It is 19. " * 8)
    assert traits("a</think>b") not in (None, traits("</think>b"), traits("</think>a</think>b"))


def test_several_templates_are_looked_at_together() -> None:
    assert Traits.of({"default": "{{ 'a' in b }}", "tool_use": "{{ 'it\\'s' in b }}"}).parts == ("a", "it's")


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages"])
def test_a_template_that_is_none_has_no_traits(template: str) -> None:
    assert Traits.of(template) == Traits()


def test_transformers_own_tag_is_known() -> None:
    assert Traits.of("{%- generation %}{{ 'a' in b }}{% endgeneration -%}").parts == ("a",)
