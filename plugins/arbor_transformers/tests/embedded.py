"""A tiny random model made on the spot, adapters for it, and the real engine process serving a model."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import openai
import yaml

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", TOKENIZERS_PARALLELISM="false")

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from arbor_core.engine import EngineSpec
from arbor_core.testing import device

OPTIONS = Path(__file__).parents[1] / "arbor_transformers" / "conf" / "backend" / "transformers.yaml"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
WORDS = ["the quick brown fox jumps over the lazy dog", "héllo wörld, 你好 🙂", "user assistant system tool 0123456789"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML's control tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=control, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(WORDS * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_model(folder: Path, **changes: Any) -> Path:
    """A random Llama whose outputs are varied (large initial weights), with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "eos_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT adapter with random, clearly effective weights."""
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**config))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


@dataclass
class Running:
    """An engine process."""

    process: subprocess.Popen[bytes]
    dir: Path
    url: str
    token: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.token or "none", max_retries=0, timeout=150)

    @property
    def aclient(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.token or "none", max_retries=0, timeout=150)

    def stop(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(120)


def options(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(OPTIONS.read_text()), "max_cached_tokens": 16384, "dtype": "float32", **changes}


def launch(model: Path, folder: Path, token: str = "secret", **changes: Any) -> subprocess.Popen[bytes]:
    """Start the process as the core does, without waiting for it."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = EngineSpec("base", str(model), folder, (device(),), 1, token, options(**changes))
    (folder / "spec.json").write_bytes(msgspec.json.encode(spec, enc_hook=str))
    with (folder / "engine.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "arbor_transformers", str(folder / "spec.json")],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )


def start(model: Path, folder: Path, token: str = "secret", **changes: Any) -> Running:
    """Start the process and wait until it listens."""
    process = launch(model, folder, token, **changes)
    deadline = time.monotonic() + 120
    while not (folder / "ready.json").exists():
        assert process.poll() is None, (folder / "engine.log").read_text()
        assert time.monotonic() < deadline, "the engine did not listen within 120 s"
        time.sleep(0.02)
    return Running(process, folder, json.loads((folder / "ready.json").read_text())["url"], token)


@dataclass
class World:
    """What most tests share."""

    model: Path
    adapters: dict[str, Path] = field(default_factory=dict)
