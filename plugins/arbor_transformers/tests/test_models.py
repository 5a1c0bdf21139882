"""Architectures beside plain attention: each must give what transformers' own `generate` gives."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from arbor_transformers import Options
from arbor_transformers.generation.detokenizer import Detokenizer, StopStrings, TokenText
from arbor_transformers.generation.loop import GenerationLoop
from arbor_transformers.generation.sampler import Sampling
from arbor_transformers.generation.sequence import Delta, Generation, Sink
from arbor_transformers.model.batch import EvenBatch, SlotBatch
from arbor_transformers.model.loading import Loaded, load, make_batch
from arbor_transformers.model.lora import AdapterRows, load_adapter
from embedded import make_adapter, make_tokenizer, options

from arbor_core.testing import device

TOKENIZER = make_tokenizer()
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS: dict[str, tuple[Any, type]] = {
    "qwen2 with some sliding layers": (
        transformers.Qwen2Config(
            **SHAPE, use_sliding_window=True, sliding_window=8, layer_types=["full_attention", "sliding_attention"]
        ),
        SlotBatch,
    ),
    "mistral, all layers sliding": (transformers.MistralConfig(**SHAPE, sliding_window=8), SlotBatch),
    "gemma3": (transformers.Gemma3TextConfig(**SHAPE, sliding_window=8, query_pre_attn_scalar=16), SlotBatch),
    "gpt2, learned positions": (
        transformers.GPT2Config(
            vocab_size=len(TOKENIZER), n_embd=64, n_layer=2, n_head=4, n_positions=256, initializer_range=0.25
        ),
        SlotBatch,
    ),
    "qwen3 experts": (
        transformers.Qwen3MoeConfig(
            **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, decoder_sparse_step=1
        ),
        SlotBatch,
    ),
    "lfm2, convolutions": (
        transformers.Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        EvenBatch,
    ),
    "mamba": (
        transformers.MambaConfig(
            vocab_size=len(TOKENIZER), hidden_size=64, num_hidden_layers=2, initializer_range=0.25, state_size=8
        ),
        EvenBatch,
    ),
    "llama, stretched positions": (
        transformers.LlamaConfig(
            **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        ),
        EvenBatch,
    ),
}


class Results(Sink):
    """Waits for sequences to end."""

    def __init__(self, count: int) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.error: Exception | None = None
        self.left, self.done = count, threading.Event()

    def put(self, delta: Delta) -> None:
        self.tokens[delta.choice] = [token.id for token in delta.tokens]
        self.error = self.error or delta.error
        self.left -= 1
        if not self.left:
            self.done.set()


def deliver(deltas: Sequence[tuple[Sink, Delta]]) -> None:
    for sink, delta in deltas:
        sink.put(delta)


def generations(loaded: Loaded, prompts: Sequence[list[int]], sink: Sink, tokens: int) -> list[Generation]:
    texts = TokenText(loaded.tokenizer)
    return [
        Generation(
            tuple(prompt), Sampling(temperature=0), i, tokens, None, sink, False, Detokenizer(texts), StopStrings([])
        )
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_generate(name: str, tmp_path: Path) -> None:
    config, kind = MODELS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    chosen = Options(**options(prefill_tokens=32))
    loaded = load(str(tmp_path), device(), chosen)
    batch, _ = make_batch(loaded, AdapterRows(loaded.model), chosen)
    assert type(batch) is kind
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, len(TOKENIZER), (n,), generator=draw).tolist() for n in (3, 40, 11, 12, 40, 5)]
    results = Results(len(prompts))
    engine = GenerationLoop(batch, 4, 100, 32, deliver, lambda: None)
    engine.start()
    engine.submit(generations(loaded, prompts, results, 24))
    assert results.done.wait(120)
    engine.stop()
    assert results.error is None
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        output = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert results.tokens[i] == output[0, len(prompt) :].tolist(), (name, i)


def test_eager_attention_and_bfloat16_serve_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for change in ({"attention": "eager"}, {"dtype": "bfloat16"}):
        chosen = Options(**options(**change))
        loaded = load(str(tmp_path), device(), chosen)
        assert type(make_batch(loaded, AdapterRows(loaded.model), chosen)[0]) is SlotBatch


def test_an_id_to_pad_with_that_the_embedding_lacks_is_no_hindrance(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pad_token_id": len(TOKENIZER)}))
    assert load(str(tmp_path), device(), Options(**options())).vocabulary == len(TOKENIZER)


def test_a_batch_that_fails_fails_its_own_rows_only(tmp_path: Path) -> None:
    """The model raises once; whoever was in that call gets an error, whoever comes later is served."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    chosen = Options(**options())
    loaded = load(str(tmp_path), device(), chosen)
    batch, _ = make_batch(loaded, AdapterRows(loaded.model), chosen)
    engine = GenerationLoop(batch, 4, 100, 64, deliver, lambda: None)
    engine.start()
    calls = 0

    def fail(module: Any, inputs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 6):
            raise RuntimeError("the fan is stuck")

    hook = loaded.model.register_forward_pre_hook(fail)
    entering, running, later = Results(1), Results(1), Results(1)
    for sink in (entering, running):
        engine.submit(generations(loaded, [[5, 6, 7]], sink, 24))
        assert sink.done.wait(120)
        assert getattr(sink.error, "code", None) == "engine_error"
    hook.remove()
    engine.submit(generations(loaded, [[5, 6, 7]], later, 24))
    assert later.done.wait(120)
    engine.stop()
    assert later.error is None and len(later.tokens[0]) == 24
    assert engine.running == 0


def test_the_cache_stays_within_its_bound(tmp_path: Path) -> None:
    """Eight sequences outgrow 512 tokens: some are sent back, all end, and no more is ever allocated."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    chosen = Options(**options(max_cached_tokens=512))
    loaded = load(str(tmp_path), device(), chosen)
    batch, context = make_batch(loaded, AdapterRows(loaded.model), chosen)
    assert isinstance(batch, SlotBatch) and context == 256
    sent_back, cells = 0, [0]

    class Watched(SlotBatch):
        def step(self, tokens: Sequence[int]) -> torch.Tensor:
            logits = super().step(tokens)
            rows, columns = self.slots.capacity
            cells.append(rows * columns)
            assert all(layer.keys.shape[0] * layer.keys.shape[2] == cells[-1] for layer in self.slots.layers)
            return logits

        def overflow(self) -> int:
            nonlocal sent_back
            surplus = super().overflow()
            sent_back += surplus
            return surplus

    batch.__class__ = Watched
    engine, results = GenerationLoop(batch, 8, 100, 64, deliver, lambda: None), Results(8)
    engine.start()
    engine.submit(generations(loaded, [[5, 6, 7 + i] for i in range(8)], results, 150))
    assert results.done.wait(120)
    assert results.error is None
    assert sent_back > 0 and 256 < max(cells) <= 512
    assert all(len(tokens) == 150 for tokens in results.tokens.values())
    engine.stop()
    engine.thread.join(120)
    assert batch.slots.capacity == (0, 0), "an empty batch holds no memory"


def test_an_adapter_is_freed_with_its_last_sequence(tmp_path: Path) -> None:
    import gc
    import weakref

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    loaded = load(str(tmp_path / "base"), device(), Options(**options()))
    path = make_adapter(tmp_path / "base", tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    rows = AdapterRows(loaded.model)
    adapter = load_adapter("a", str(path), loaded.model)
    rows.attach(adapter)
    alive = weakref.ref(adapter)
    with rows.of([adapter, None]):
        assert rows.groups
    del adapter
    gc.collect()
    assert alive() is None
