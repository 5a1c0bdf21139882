"""A base model of about one million parameters with random weights, for demos and tests: no download, no GPU.

    python -m arbor_sft.tiny DIR

Its tokenizer is bytes: any text in any language, one token per byte, so that tasks on single characters can be learned.
Only what opens a chat message (`assistant` and a line break) is one token, which makes short chats half as long.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
OPENINGS = ("system\n", "user\n", "assistant\n", "tool\n")
CHAT_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}"
    "{%- set messages = messages[1:] %}{% endif %}"
    "{{- 'Tools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '<tool_call>' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}"
    "{{- '</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML, with tools as JSON. It has no `{% generation %}`, like most templates in the wild."""


def make(path: Path, *, seed: int = 0, context: int = 2048) -> None:
    """Write config, weights (safetensors), tokenizer and chat template; the same seed writes the same bytes.

    Args:
        path: Directory, made if it is not there.
        seed: Of the random weights.
        context: Longest sequence, in tokens (bytes of text).
    """
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokens = tokenizer(context)
    config = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(path)
    tokens.save_pretrained(path)


def tokenizer(context: int = 2048) -> PreTrainedTokenizerFast:
    """256 byte tokens, three special ones and the openings."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (END, START, STOP)])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in OPENINGS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token=STOP,
        pad_token=END,
        model_max_length=context,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m arbor_sft.tiny DIR", file=sys.stderr)
        return 2
    make(Path(sys.argv[1]))
    print(f"wrote a tiny model to {sys.argv[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
