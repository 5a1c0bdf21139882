"""Which tokens are learned: hand-checked for each kind of chat template."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import trl_templates as t
from arbor_sft.tiny import CHAT_TEMPLATE, tokenizer
from arbor_trl.chat import IGNORED, ChatFormat, Sample
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def msg(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TWO_TURNS = [
    msg("system", "Be kind."),
    msg("user", "Hi"),
    msg("assistant", "Hello!"),
    msg("user", "Bye"),
    msg("assistant", "See you."),
]


def chat(template: str | None) -> ChatFormat:
    found = tokenizer()
    found.add_special_tokens({"additional_special_tokens": list(t.SPECIAL)})
    found.chat_template = template
    return ChatFormat(found)


def samples(template: str, messages: list[dict[str, Any]], **row: Any) -> tuple[ChatFormat, list[Sample]]:
    made = chat(template)
    return made, made.encode(made.render({"messages": messages, **row}))


def learned(made: ChatFormat, sample: Sample) -> list[str]:
    """The texts with loss."""
    runs = groupby(zip(sample.ids, sample.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    found = []
    for with_loss, pairs in runs:
        if with_loss:
            ids = [token for token, label in pairs]
            found.append(made.tokenizer.decode(ids, skip_special_tokens=False))
    return found


def text(made: ChatFormat, sample: Sample) -> str:
    return str(made.tokenizer.decode(sample.ids, skip_special_tokens=False))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(t.CHATML, [["Hello!<|im_end|>", "See you.<|im_end|>"]], id="chatml"),
        pytest.param(t.GENERATION, [["Hello!<|im_end|>", "See you.<|im_end|>"]], id="generation-tag"),
        pytest.param(t.LLAMA3, [["Hello!<|eot|>", "See you.<|eot|>"]], id="llama3"),
        pytest.param(t.MISTRAL, [[" Hello!</s>"], [" See you.</s>"]], id="mistral"),
        pytest.param(
            t.THINK,
            [["<think>\n\n</think>\n\nHello!<|im_end|>"], ["<think>\n\n</think>\n\nSee you.<|im_end|>"]],
            id="think",
        ),
        pytest.param(t.UNCLOSED, [["Hello!<|im_end|>"], ["See you.<|im_end|>"]], id="unclosed"),
    ],
)
def test_two_turns(template: str, expected: list[list[str]]) -> None:
    made, found = samples(template, TWO_TURNS)
    assert [learned(made, sample) for sample in found] == expected
    for sample in found:
        assert all(label in (IGNORED, token) for token, label in zip(sample.ids, sample.labels, strict=True))
        assert sample.labels[0] == IGNORED


def test_a_turn_of_its_own_is_rendered_as_the_engine_will_see_it() -> None:
    made, found = samples(t.THINK, TWO_TURNS)
    prompt = made.tokenizer.apply_chat_template(TWO_TURNS[:4], add_generation_prompt=True, tokenize=False)
    assert text(made, found[1]).startswith(prompt)
    assert "<think>" not in prompt, "the earlier turn's reasoning is stripped"
    made, found = samples(t.MISTRAL, TWO_TURNS)
    assert text(made, found[0]) == "<s>[INST] Be kind. Hi[/INST] Hello!</s>"
    assert text(made, found[1]) == "<s>[INST] Hi[/INST] Hello!</s>[INST] Be kind. Bye[/INST] See you.</s>"


def test_generation_tags_agree() -> None:
    made, (sample,) = samples(t.GENERATION, TWO_TURNS)
    theirs = made.tokenizer.apply_chat_template(
        TWO_TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = len(sample.ids)
    assert theirs["input_ids"][:kept] == sample.ids
    assert theirs["assistant_masks"][:kept] == [int(label != IGNORED) for label in sample.labels]


@pytest.mark.parametrize("template", [t.CHATML, t.LLAMA3, t.MISTRAL, t.THINK])
def test_weight_0_is_context_only(template: str) -> None:
    silent = [*TWO_TURNS[:2], {**TWO_TURNS[2], "weight": 0}, *TWO_TURNS[3:]]
    made, (sample,) = samples(template, silent)
    (only,) = learned(made, sample)
    assert "See you." in only
    assert "Hello!" in text(made, sample)
    last = [*TWO_TURNS[:4], {**TWO_TURNS[4], "weight": 0}]
    made, (sample,) = samples(template, last)
    (only,) = learned(made, sample)
    assert "Hello!" in only
    assert "See you." not in text(made, sample), "what follows the last learned turn changes nothing"
    same = [*TWO_TURNS[:2], {**TWO_TURNS[2], "weight": 1}, *TWO_TURNS[3:]]
    assert samples(template, same)[1] == samples(template, TWO_TURNS)[1]


def test_reasoning_is_learned() -> None:
    messages = [msg("user", "2+2?"), msg("assistant", "4", reasoning_content="Easy.")]
    made, (sample,) = samples(t.THINK, messages)
    assert learned(made, sample) == ["<think>\nEasy.\n</think>\n\n4<|im_end|>"]


def test_tools_and_calls() -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        msg("user", "Rain?"),
        msg("assistant", None, tool_calls=[call]),
        msg("tool", "no", tool_call_id="1"),
        msg("assistant", "No."),
    ]
    made, (sample,) = samples(t.TOOLS, messages, tools=tools)
    assert learned(made, sample) == ["<call>weather(city=Rome)</call><|im_end|>", "No.<|im_end|>"]
    assert text(made, sample).startswith('<tools>[{"type": "function"')
    old = [msg("user", "Rain?"), {"role": "assistant", "function_call": call["function"]}]
    made, (sample,) = samples(t.TOOLS, old)
    assert learned(made, sample) == ["<call>weather(city=Rome)</call><|im_end|>"]


def test_the_tiny_model_knows_tools() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [msg("system", "Be brief."), msg("user", "Rain?"), msg("assistant", "No.")]
    made, (sample,) = samples(CHAT_TEMPLATE, messages, tools=tools)
    assert learned(made, sample) == ["No.<|im_end|>"]
    assert text(made, sample).count("Be brief.") == 1 and "weather" in text(made, sample)


def test_an_answer_to_nothing() -> None:
    greeting = msg("assistant", "Welcome!")
    row = [greeting, msg("user", "Hi"), msg("assistant", "Hello.")]
    made, (sample,) = samples(CHAT_TEMPLATE, row)
    assert learned(made, sample) == ["Welcome!<|im_end|>", "Hello.<|im_end|>"]
    assert text(made, sample).startswith("<|im_start|>assistant\nWelcome!<|im_end|>\n<|im_start|>user")
    with pytest.raises(ValueError, match="answers nothing: put a message before it, or weight 0"):
        samples(t.NO_PROMPT, row)
    made, (sample,) = samples(t.NO_PROMPT, [{**greeting, "weight": 0}, *row[1:]])
    assert learned(made, sample) == ["Hello.<|im_end|>"]


def test_the_prompt_is_what_is_sent_where_a_later_turn_changes_it() -> None:
    """Mistral's templates write the system prompt before a question that comes last, and drop it after that."""
    row = [msg("system", "Be kind."), msg("user", "Hi"), msg("assistant", "Hello!")]
    made, (sample,) = samples(t.MISTRAL_V3, row)
    assert text(made, sample) == "<s>[INST] Be kind.\n\nHi[/INST] Hello!</s>"
    assert learned(made, sample) == [" Hello!</s>"]
    prompt = made.tokenizer.apply_chat_template(row[:2], add_generation_prompt=True, tokenize=False)
    assert text(made, sample).startswith(prompt)


def test_a_thought_that_the_prompt_opens_is_closed() -> None:
    """As DeepSeek-R1's distillations do, which never write thoughts."""
    made, (sample,) = samples(t.FORCED_THINK, [msg("user", "2+2?"), msg("assistant", "4")])
    assert text(made, sample) == "<|user|>2+2?<|im_end|><|assistant|><think>\n\n</think>\n\n4<|im_end|>"
    assert learned(made, sample) == ["\n</think>\n\n4<|im_end|>"]
    inline = msg("assistant", "<think>\nEasy.\n</think>\n\n4")
    for answer in (msg("assistant", "4", reasoning_content="Easy."), inline):
        made, (sample,) = samples(t.FORCED_THINK, [msg("user", "2+2?"), answer])
        assert learned(made, sample) == ["Easy.\n</think>\n\n4<|im_end|>"]
    made, found = samples(
        t.FORCED_THINK, [msg("user", "A"), msg("assistant", "B"), msg("user", "C"), msg("assistant", "D")]
    )
    assert [learned(made, sample) for sample in found] == [["\n</think>\n\nB<|im_end|>"], ["\n</think>\n\nD<|im_end|>"]]
    assert "<|assistant|>B<|im_end|>" in text(made, found[1]), "an engine sees earlier turns without thoughts"


def test_a_second_end_is_the_conversations_and_not_the_turns() -> None:
    """Phi 3 ends its texts, but not its turns, with the end token."""
    made, (sample,) = samples(t.ENDS_TEXTS, TWO_TURNS)
    assert learned(made, sample) == ["Hello!<|eot|>", "See you.<|eot|>"]


def test_text_parts_and_developer() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    made, (sample,) = samples(t.CHATML, [msg("developer", "Be kind."), msg("user", "Hi"), msg("assistant", parts)])
    assert learned(made, sample) == ["Hello<|im_end|>"]
    assert "<|im_start|>system\nBe kind.<|im_end|>" in text(made, sample)


def test_a_template_that_names_developers_and_does_not_write_them() -> None:
    """The role is a system prompt then, and not lost; where it is written it stays."""
    conversation = [msg("developer", "Be kind."), msg("user", "Hi"), msg("assistant", "Hello")]
    drops = "{# helps a developer #}" + t.CHATML.replace(
        "for m in messages", "for m in messages if m.role != 'developer'"
    )
    made, (sample,) = samples(drops, conversation)
    assert "<|im_start|>system\nBe kind.<|im_end|>" in text(made, sample)
    made, (sample,) = samples("{# helps a developer #}" + t.CHATML, conversation)
    assert "<|im_start|>developer\nBe kind.<|im_end|>" in text(made, sample)


def test_any_text_comes_back() -> None:
    answer = "Grüße, 世界 👩‍👩‍👧 \u200f\t\n <b>&amp;</b>"
    made, (sample,) = samples(t.CHATML, [msg("user", "é\n\n"), msg("assistant", answer)])
    assert learned(made, sample) == [answer + "<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "messages", "words"),
    [
        pytest.param(t.PROMPT_DIFFERS, TWO_TURNS, "otherwise than its generation prompt", id="prompt-differs"),
        pytest.param(t.ALTERNATING, [*TWO_TURNS], "refuses it: roles must alternate", id="refused"),
    ],
)
def test_what_is_unclear_is_not_trained(template: str, messages: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        samples(template, messages)


def test_no_template() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        chat(None)


def test_template_without_end_and_tokenizer_without_one() -> None:
    made = chat(t.UNCLOSED)
    made.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        made.render({"messages": TWO_TURNS})


def merging(*, trim: bool) -> PreTrainedTokenizerFast:
    """A tokenizer whose merges cross the beginning of a turn (line breaks, and a space before a word)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    learn = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["\n\nHello A: Hello \n\n"] * 50, learn)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=t.CHATML)


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("answer", ["\nHello", " Hello", "Hello"])
def test_a_turn_begins_where_the_prompt_ends(trim: bool, answer: str) -> None:
    """The ids before the answer are those of the prompt alone, as an engine sends it."""
    made = ChatFormat(merging(trim=trim))
    if answer.startswith(" "):
        made.tokenizer.chat_template = t.CHATML.replace("}}\n{{", "}}:{{").replace("assistant\n", "assistant:")
    messages = [msg("user", "A"), msg("assistant", answer)]
    (sample,) = made.encode(made.render({"messages": messages}))
    prompt = made.tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    ids = made.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert sample.ids[: len(ids)] == ids
    assert sample.labels[: len(ids)] == [IGNORED] * len(ids)
    assert learned(made, sample) == [answer + "<|im_end|>"]
