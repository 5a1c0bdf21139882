"""Text from tokens: whole characters only, and nothing of a stop string."""

import random

import pytest
from arbor_transformers.generation.detokenizer import Detokenizer, StopStrings, TokenText
from embedded import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

TOKENIZER = make_tokenizer()
TEXTS = TokenText(TOKENIZER)
MIXED = "naïve 你好, wörld 🙂🙃 — ½ of it\n\tends here " * 4


def byte_fallback() -> TokenText:
    """A tokenizer of the SentencePiece family, which shows every byte of an unfinished character as a broken one."""
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁b": 3, **{f"<0x{byte:02X}>": byte + 4 for byte in range(256)}}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TokenText(PreTrainedTokenizerFast(tokenizer_object=inner))


FALLBACK = byte_fallback()


def test_pieces_join_to_the_text_and_hold_no_half_character() -> None:
    detokenizer = Detokenizer(TEXTS)
    pieces = [detokenizer.add(token) for token in TOKENIZER(MIXED).input_ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == MIXED
    assert sum(map(bool, pieces)) > 20


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, len(TOKENIZER) - 1), max_size=80))
def test_any_tokens_stream_to_what_they_decode_to(tokens: list[int]) -> None:
    detokenizer = Detokenizer(TEXTS)
    streamed = "".join(detokenizer.add(token) for token in tokens) + detokenizer.flush()
    assert streamed == TEXTS.decode(tokens)
    assert detokenizer.length == len(streamed)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aé你🙂 b", max_size=60))
def test_byte_fallback_streams_whole_characters(text: str) -> None:
    tokens = [byte + 4 for byte in text.encode()]
    detokenizer = Detokenizer(FALLBACK)
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == FALLBACK.decode(tokens)
    assert "\ufffd" not in "".join(pieces)


def test_single_tokens_are_bytes() -> None:
    tokens = TOKENIZER(MIXED).input_ids
    assert b"".join(TEXTS.bytes(token) for token in tokens).decode() == MIXED
    assert TEXTS.bytes(TOKENIZER.eos_token_id) == b"<|im_end|>"
    assert FALLBACK.bytes(3) == b" b" and FALLBACK.bytes(0xE4 + 4) == b"\xe4"
    broken = next(token for token in tokens if TEXTS.text(token) == "\ufffd")
    assert TEXTS.label(broken).startswith("bytes:\\x")
    assert TEXTS.bytes(10**6) == b""


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_cut_anywhere(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choice("abc") for _ in range(60))
    stops = ["".join(draw.choice("abc") for _ in range(draw.randint(2, 6))) for _ in range(3)]
    matcher, shown, at = StopStrings(stops), "", 0
    while at < len(text) and not matcher.stopped:
        size = draw.randint(1, 4)
        shown += matcher.add(text[at : at + size])
        assert not any(stop in shown for stop in stops)
        at += size
    ends = [text.find(stop) for stop in stops if stop in text]
    if matcher.stopped:
        assert shown == text[: min(ends)]
    else:
        assert shown + matcher.flush() == text


def test_a_stop_string_does_not_count_before_it_is_armed() -> None:
    matcher = StopStrings(["ab"])
    assert matcher.add("xab", armed=False) == "xab"
    assert not matcher.stopped
    assert matcher.add("ya") == "y"
    assert matcher.add("bz") == ""
    assert matcher.stopped
