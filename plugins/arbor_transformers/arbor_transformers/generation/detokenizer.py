"""Tokens to text, as they come: never half a character, never half a stop string."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

BROKEN = "\N{REPLACEMENT CHARACTER}"
LONGEST_BROKEN = 8
"""Broken characters at the end of a text that may still become whole ones. With byte fallback every byte of a run is
decoded as one until the run is whole: up to 4 of the character before and 3 of the unfinished one."""
WINDOW = 16
"""Tokens after which the start of the decoded window moves on, where finished characters stay as they are."""


class Detokenizer:
    """The text of a growing list of tokens.

    Only a window of the last tokens is decoded again for each new one. The window moves where the text ends with a
    whole character, and keeps the tokens of one move as context, because decoders treat a first token differently.
    """

    def __init__(self, texts: "TokenText") -> None:
        self.decode, self.step = texts.decode, texts.window
        self.window: list[int] = []
        self.context = 0
        """How many tokens of the window are the context."""
        self.emitted = 0
        """Characters of the window's text that have been returned."""
        self.length = 0
        """Characters returned altogether."""

    def add(self, token: int) -> str:
        """The characters that this token completes."""
        self.window.append(token)
        text = self.decode(self.window)
        broken = len(text) - len(text.rstrip(BROKEN))
        if broken > LONGEST_BROKEN:
            broken = 1
        new = self._give(text, len(text) - broken)
        if not broken and len(self.window) - self.context >= self.step:
            self.window = self.window[self.context :]
            self.context, self.emitted = len(self.window), len(self.decode(self.window))
        return new

    def flush(self) -> str:
        """What is left at the end, broken characters included."""
        text = self.decode(self.window)
        return self._give(text, len(text))

    def _give(self, text: str, end: int) -> str:
        new = text[self.emitted : end]
        self.emitted = max(self.emitted, end)
        self.length += len(new)
        return new


class StopStrings:
    """Passes text on up to the first stop string and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def add(self, text: str, armed: bool = True) -> str:
        """The text that may be sent. `armed` False: a stop string counts as text (before `min_tokens`)."""
        text, self.held = self.held + text, ""
        if not armed or not self.stops:
            return text
        positions = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if positions:
            self.stopped = True
            return text[: min(positions)]
        for size in range(min(len(text), max(map(len, self.stops)) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stops):
                self.held = text[-size:]
                return text[:-size]
        return text

    def flush(self) -> str:
        text, self.held = self.held, ""
        return text


class TokenText:
    """Single tokens as text and bytes, for log-probabilities.

    Args:
        tokenizer: Used by one thread at a time; give every thread its own copy.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        self.decoders = decoder_types(tokenizer)
        # With byte fallback, and for all we know of a slow tokenizer, an unfinished character breaks the whole ones
        # before it as well, so that no more than one of them may be in the window.
        self.window = 1 if "ByteFallback" in self.decoders or not self.decoders else WINDOW

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of several tokens, control tokens left out."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def bytes(self, token: int) -> bytes:
        """The bytes a token stands for, which may be a part of a character."""
        if token in self.added:
            return self.added[token].encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if "ByteLevel" in self.decoders and all(character in BYTE_OF for character in piece):
            return bytes(BYTE_OF[character] for character in piece)
        if "ByteFallback" in self.decoders and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if self.decoders & {"Metaspace", "ByteFallback"}:
            return piece.replace("\u2581", " ").encode()
        return self.decode([token]).encode()

    def text(self, token: int) -> str:
        """A token as text; a part of a character becomes the replacement character."""
        return self.bytes(token).decode(errors="replace")

    def label(self, token: int) -> str:
        """A token as a key that tells broken characters apart."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def decoder_types(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names of the steps by which a fast tokenizer turns tokens into text; empty for a slow one."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    return {step["type"] for step in [state, *state.get("decoders", [])]}


def byte_alphabet() -> dict[str, int]:
    """How byte-level BPE (GPT-2) writes bytes: printable ones as they are, others as characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_OF = byte_alphabet()
