"""No chat template loses in silence what an assistant said: all that TRL packages, and others, with rows of all kinds.

Every text of a row has words of its own. What was trained is read from the tokens, and what a prompt is from what
engines use, so that nothing here relies on how turns are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import count, groupby
from pathlib import Path
from typing import Any

import pytest
import trl
import trl_templates as t
from arbor_sft.tiny import CHAT_TEMPLATE, tokenizer
from arbor_trl.chat import IGNORED, ChatFormat, Rendered, Sample
from transformers import PreTrainedTokenizerFast

PACKAGED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
OTHERS = {
    "tiny": CHAT_TEMPLATE,
    "mistral": t.MISTRAL,
    "mistral-v3": t.MISTRAL_V3,
    "hermes": t.HERMES,
    "llama3-like": t.LLAMA3,
    "think": t.THINK,
    "forced-think": t.FORCED_THINK,
    "content-only": t.CHATML,
    "unclosed": t.UNCLOSED,
    "ends-texts": t.ENDS_TEXTS,
    "arguments-as-text": t.ARGUMENTS_AS_TEXT,
    "content-none": t.CONTENT_NONE,
    "twice": t.TWICE,
    "escaped": t.ESCAPED,
    "sorted": t.SORTED,
    "merging": t.MERGING,
    "drops-turns": t.DROPS_TURNS,
    "dated": t.DATED,
}
TEMPLATES = {path.stem: path.read_text() for path in PACKAGED} | OTHERS
BAR = "[|\uff5c]"
CONTROL = re.compile(
    rf"<{BAR}[a-z_]+>|<[a-z_]+[|]>|<{BAR}[^<>{{}}\n'\"]{{1,40}}?{BAR}>"
    r"|</?s>|</?(?:start_of_turn|end_of_turn|end_of_utterance)>"
)
REFUSALS = re.compile(
    r"(leaves out|changes) messages\[\d+\]\."
    r"(content|refusal|(tool_calls\[\d\]\.function|function_call)\.(name|arguments))$"
    r"|refuses it: |otherwise than its generation prompt begins|answers nothing"
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks it up.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}},
                "required": ["city"],
            },
        },
    }
    for name in ("weather", "clock")
]


class Words:
    """Texts that no other text of a row has."""

    def __init__(self) -> None:
        self.numbers = count(1)

    def __call__(self, before: str = "", after: str = "") -> str:
        number = next(self.numbers)
        return f"{before}lorem{number}q, “ipsum” & dolor{number}q{after}"

    def call(self, number: int = 1, **more: Any) -> dict[str, Any]:
        name, key = (f"{kind}{next(self.numbers)}q" for kind in ("fn", "key"))
        arguments = json.dumps({key: self(), "nested": {"list": [self(), 7]}, **more}, ensure_ascii=False)
        return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def user(words: Words) -> dict[str, Any]:
    return {"role": "user", "content": words()}


def said(words: Words, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": words(), **more}


def calls(words: Words, content: str | None = None, number: int = 1, **more: Any) -> dict[str, Any]:
    found = [words.call(at + 1) for at in range(number)]
    return {"role": "assistant", "content": content, "tool_calls": found, **more}


def result(words: Words, number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": words()}


def system(words: Words) -> dict[str, Any]:
    return {"role": "system", "content": words()}


def no_arguments(words: Words) -> dict[str, Any]:
    call = words.call()
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{**call, "function": {"name": call["function"]["name"], "arguments": "{}"}}],
    }


def legacy(words: Words) -> list[dict[str, Any]]:
    function = words.call()["function"]
    answered = {"role": "function", "name": function["name"], "content": words()}
    return [user(words), {"role": "assistant", "content": None, "function_call": function}, answered, said(words)]


Shape = Callable[[Words], list[dict[str, Any]]]
SHAPES: dict[str, Shape] = {
    "one turn": lambda w: [user(w), said(w)],
    "turns": lambda w: [user(w), said(w), user(w), said(w)],
    "system": lambda w: [system(w), user(w), said(w), user(w), said(w)],
    "assistant first": lambda w: [said(w), user(w), said(w)],
    "system, assistant first": lambda w: [system(w), said(w), user(w), said(w)],
    "null content": lambda w: [user(w), calls(w)],
    "empty content": lambda w: [user(w), calls(w, "")],
    "text and call": lambda w: [user(w), calls(w, w())],
    "parallel": lambda w: [user(w), calls(w, number=2), result(w), result(w, 2), said(w)],
    "results": lambda w: [system(w), user(w), calls(w), result(w), said(w), user(w), said(w)],
    "reasoning": lambda w: [user(w), said(w, reasoning_content=w())],
    "reasoning twice": lambda w: [user(w), said(w, reasoning_content=w()), user(w), said(w, reasoning_content=w())],
    "reasoning, call": lambda w: [
        user(w), calls(w, reasoning_content=w()), result(w), said(w, reasoning_content=w())
    ],
    "thought in content": lambda w: [user(w), {"role": "assistant", "content": w("<think>\n", f"\n</think>\n\n{w()}")}],
    "spaces": lambda w: [{"role": "user", "content": w(" ", "\n")}, {"role": "assistant", "content": w("\n ", " \n")}],
    "functions": legacy,
    "no calls": lambda w: [user(w), said(w, tool_calls=[])],
    "refusal": lambda w: [user(w), {"role": "assistant", "content": None, "refusal": w()}],
    "context": lambda w: [user(w), said(w, weight=0), user(w), said(w)],
    "call as context": lambda w: [user(w), calls(w, weight=0), result(w), said(w)],
    "no arguments": lambda w: [user(w), no_arguments(w)],
    "assistant twice": lambda w: [user(w), said(w), said(w)],
    "thought twice": lambda w: [
        user(w), {"role": "assistant", "content": w("<think>\n", f"\n</think>\n\n{w()}"), "reasoning_content": w()}
    ],
    "many turns": lambda w: [each for _ in range(9) for each in (user(w), said(w))],
    "many calls": lambda w: [user(w), *(each for _ in range(9) for each in (calls(w), result(w))), said(w)],
    "mixed": lambda w: [
        system(w), user(w), calls(w, reasoning_content=w()), result(w), said(w), user(w), said(w, weight=0),
        user(w), said(w), user(w), calls(w), result(w), calls(w), result(w), said(w, reasoning_content=w()),
        user(w), said(w), user(w), said(w),
    ],
}  # fmt: skip


def prepared(template: str) -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer with a template, and the control tokens that it writes."""
    found = tokenizer(1 << 20)
    found.add_special_tokens({"additional_special_tokens": sorted({*CONTROL.findall(template), "<bos>", "<eos>"})})
    found.bos_token, found.chat_template = "<bos>", template
    if "im_end" not in template:
        found.eos_token = "<eos>"
    return found


def words_in(value: Any) -> set[str]:
    return set(re.findall(r"(?:lorem|dolor|fn|key)\d+q", json.dumps(value, ensure_ascii=False)))


def learned(chat: ChatFormat, sample: Sample) -> Iterator[tuple[int, str]]:
    """Where runs of tokens with a loss begin, and their texts."""
    at = 0
    for with_loss, run in groupby(sample.labels, key=lambda label: label != IGNORED):
        ids = list(run)
        if with_loss:
            yield at, chat.tokenizer.decode(ids, skip_special_tokens=False)
        at += len(ids)


# TRL's variants for training differ from the originals in little
CASES = [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("_training")) for name in TEMPLATES]


@pytest.mark.parametrize("name", CASES)
def test_all_that_was_said_is_learned_or_the_row_is_refused(name: str) -> None:
    chat = ChatFormat(prepared(TEMPLATES[name]))
    trained = 0
    for shape, make in SHAPES.items():
        messages = make(Words())
        tools = TOOLS if "call" in json.dumps(messages) else None
        unlearned: list[str] = []
        try:
            rendered = chat.render({"messages": messages, "tools": tools}, unlearned.append)
        except ValueError as error:
            if not REFUSALS.search(str(error)):
                raise
            continue
        trained += 1
        samples = chat.encode(rendered)
        same_by_offsets(chat, rendered)
        check(chat, messages, tools, samples, unlearned, shape)
    assert trained >= 8, "most rows without calls can be trained with any template"


def same_by_offsets(chat: ChatFormat, rendered: list[Rendered]) -> None:
    """Parts of a text are found by control tokens where they are by the characters of each token."""
    for each in rendered:
        (ids,) = chat.spans.ids([each.text])
        fast, slow = chat.spans.by_controls(each.text, ids, each.spans), chat.spans.by_offsets(each.chat, each.spans)
        assert fast is None or (ids, fast) == slow


def check(
    chat: ChatFormat,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    samples: list[Sample],
    unlearned: list[str],
    shape: str,
) -> None:
    """What was said is learned once, nothing else is, and what precedes a turn is its prompt."""
    runs = [(sample, at, text) for sample in samples for at, text in learned(chat, sample)]
    teaches = {i: m for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0}
    by_words: dict[str, int] = {}
    for index, message in enumerate(messages):
        by_words |= dict.fromkeys(words_in(message) - by_words.keys(), index)
    seen = []
    for sample, at, text in runs:
        # nothing but one message, or several that the assistant said one after the other
        index, *more = sorted({by_words[word] for word in words_in(text)})
        assert more == list(range(index + 1, index + 1 + len(more)))
        for each in (index, *more):
            lost = words_in(messages[each]) - words_in(text)
            if "reasoning_content" in unlearned:
                lost -= words_in(messages[each].get("reasoning_content"))
            assert not lost, f"{shape}: messages[{each}] lacks {lost} in {text!r}"
        prompt = chat.chats.prompt(chat.chats.conversation(messages[:index], tools)) if index else None
        if prompt is not None:
            assert sample.ids[:at] == chat.chats.encode(prompt)[0], f"{shape}: messages[{index}] has another prompt"
        assert sample.labels[-1] == IGNORED or sample.labels[-1] in chat.stop_ids
        seen += [index, *more]
    assert sorted(seen) == sorted(teaches), f"{shape}: each turn is learned once"


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3", "nemotron_3_nano", "glm4moe", "gptoss", "qwen3_8"])
def test_thinking_templates_learn_thoughts(name: str) -> None:
    chat = ChatFormat(prepared(TEMPLATES[name]))
    for shape in ("reasoning", "reasoning twice", "thought in content"):
        unlearned: list[str] = []
        messages = SHAPES[shape](Words())
        samples = chat.encode(chat.render({"messages": messages}, unlearned.append))
        assert not unlearned
        check(chat, messages, None, samples, [], shape)


def test_templates_without_a_place_for_thoughts_say_so() -> None:
    unlearned: list[str] = []
    ChatFormat(prepared(t.CHATML)).render({"messages": SHAPES["reasoning"](Words())}, unlearned.append)
    assert unlearned == ["reasoning_content"]


def writes(content: str = "{{ m.content }}", value: str = "{{ v }}") -> str:
    """A template that writes contents and the values of arguments in these ways."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n" + content + "{% for c in m.tool_calls or [] %}"
        "<call>{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}=" + value + " {% endfor %})"
        "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


CHANGING = {
    "replace": writes("{{ m.content | replace('secret', '') }}"),
    "drop sentences": writes("{% for s in m.content.split('.') if 'secret' not in s %}{{ s }}.{% endfor %}"),
    "lower": writes("{{ m.content | lower }}"),
    "title": writes("{{ m.content | title }}"),
    "strip tags": writes("{{ m.content | striptags }}"),
    "escape": writes("{{ m.content | e }}"),
    "words": writes("{{ m.content.split() | join(' ') }}"),
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_a_template_changes_is_refused(name: str) -> None:
    """Also where its beginning and its end are as they were."""
    chat = ChatFormat(prepared(CHANGING[name]))
    answer = "It is <b>here</b>. A secret &\n  Here it is."
    messages = [user(Words()), {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match=r"template (changes|leaves out) messages\[1\]\.content$"):
        chat.render({"messages": messages})


@pytest.mark.parametrize(
    "value", ["{% if v is string %}{{ v }}{% endif %}", "{{ v or '' }}", "{{ v if v is not boolean else '' }}"]
)
def test_numbers_and_truth_values_are_looked_for(value: str) -> None:
    """`6` is no `60`, and `1` is none of the numbers of messages after it."""
    function = {"name": "go", "arguments": json.dumps({"to": "60", "far": 0, "fast": False, "times": [6, 1.5]})}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    row = {"messages": [{"role": "user", "content": "0 6 1.5 false"}, call, user(Words()), said(Words())]}
    row["messages"][2]["content"] += "0 6 1.5 False"
    with pytest.raises(ValueError, match=r"leaves out messages\[1\]\.tool_calls\[0\]\.function\.arguments$"):
        ChatFormat(prepared(writes(value=value))).render({**row, "tools": TOOLS})
    for whole in (writes(), writes(value="{{ v | tojson }}"), t.ARGUMENTS_AS_TEXT, t.HERMES):
        ChatFormat(prepared(whole)).render({**row, "tools": TOOLS})


@pytest.mark.parametrize("content", ["{{ m.content | trim }}", "{{ m.content | tojson }}", "It said: {{ m.content }}"])
def test_texts_may_be_trimmed_quoted_and_introduced(content: str) -> None:
    chat = ChatFormat(prepared(writes(content)))
    answer = ' It is <b>here</b>.\n  "A" secret & é\n'
    (sample,) = chat.encode(chat.render({"messages": [user(Words()), {"role": "assistant", "content": answer}]}))
    (text,) = [text for _, text in learned(chat, sample)]
    assert answer.strip() in text or json.dumps(answer.strip(), ensure_ascii=False)[1:-1] in text


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "qwen3_6"])
def test_a_thought_that_ends_twice_loses_its_middle(name: str) -> None:
    """These write what precedes the first end, and what follows the last one. An empty thought is none."""
    chat = ChatFormat(prepared(TEMPLATES[name]))
    answer = {"role": "assistant", "content": "<think>\none\n</think>\n\ntwo</think>\n\nthree"}
    with pytest.raises(ValueError, match=r"changes messages\[1\]\.content$"):
        chat.render({"messages": [user(Words()), answer]})
    empty = {"role": "assistant", "content": "<think>\n\n</think>\n\ntwo, three"}
    chat.render({"messages": [user(Words()), empty, user(Words()), empty]})
    chat.chats.prompt(chat.chats.conversation([user(Words()), empty, user(Words())], None))
