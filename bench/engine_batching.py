"""Which generation loop the embedded engine should stand on: tokens per second of three, on one tiny model in one run.

    python bench/engine_batching.py [--requests 8,32,64] [--prompt 150] [--tokens 64] [--repeats 3]

(a) the engine's own batching over slots, driven as the server drives it (sequences arrive together, text included),
(b) transformers' continuous batching, (c) transformers' batched `generate` on all requests at once, which no server
could do because requests do not arrive together, so it is the yardstick rather than a candidate. All greedy.
Prints one JSON object; `ratio` is (a) against the better of the others.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="2", OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", TOKENIZERS_PARALLELISM="false")

import arbor_transformers
import torch
import yaml
from arbor_transformers import Options
from arbor_transformers.generation.detokenizer import Detokenizer, StopStrings, TokenText
from arbor_transformers.generation.loop import GenerationLoop
from arbor_transformers.generation.sampler import Sampling
from arbor_transformers.generation.sequence import Delta, Generation, Sink
from arbor_transformers.model.loading import Loaded, load, make_batch
from arbor_transformers.model.lora import AdapterRows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from arbor_core.testing import device

logging.set_verbosity_error()


def tiny_model(folder: Path) -> Path:
    """A Llama of about a million parameters with a byte tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Done(Sink):
    """Counts the sequences that have ended."""

    def __init__(self, expected: int) -> None:
        self.left, self.event, self.tokens = expected, threading.Event(), 0

    def put(self, delta: Delta) -> None:
        self.tokens += len(delta.tokens)
        self.left -= delta.finish is not None
        if not self.left:
            self.event.set()


def own_engine(loaded: Loaded, options: Options) -> Callable[[list[list[int]], int], int]:
    """(a): a running engine; the function runs prompts through it and returns the tokens made."""
    lora = AdapterRows(loaded.model)
    batch, _ = make_batch(loaded, lora, options)

    def deliver(deltas: list[tuple[Sink, Delta]]) -> None:
        for sink, delta in deltas:
            sink.put(delta)

    engine = GenerationLoop(
        batch, options.max_batch, options.max_waiting, options.prefill_tokens, deliver, lambda: None
    )
    engine.start()
    texts = TokenText(loaded.tokenizer)

    def run(prompts: list[list[int]], tokens: int) -> int:
        done = Done(len(prompts))
        for prompt in prompts:
            text, stops = Detokenizer(texts), StopStrings([])
            greedy = Sampling(temperature=0)
            engine.submit([Generation(tuple(prompt), greedy, 0, tokens, None, done, False, text, stops)])
        done.event.wait()
        return done.tokens

    return run


def continuous_batching(loaded: Loaded) -> Callable[[list[list[int]], int], int]:
    """(b): transformers' continuous batching, with the settings that keep it in memory."""
    from transformers import ContinuousBatchingConfig

    def run(prompts: list[list[int]], tokens: int) -> int:
        greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)
        settings = ContinuousBatchingConfig(
            num_blocks=512, max_batch_tokens=2048, use_async_batching=False, use_cuda_graph=False
        )
        results = loaded.model.generate_batch(
            prompts, generation_config=greedy, continuous_batching_config=settings, progress_bar=False
        )
        return sum(len(result.generated_tokens) for result in results.values())

    return run


def batched_generate(loaded: Loaded) -> Callable[[list[list[int]], int], int]:
    """(c): one call of `generate` with all prompts."""

    def run(prompts: list[list[int]], tokens: int) -> int:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = loaded.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, pad_token_id=0
        )
        return (output.shape[1] - longest) * len(prompts)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", default="8,32,64")
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    ask = parser.parse_args()
    defaults = Path(arbor_transformers.__file__).parent / "conf" / "backend" / "transformers.yaml"
    options = Options(**yaml.safe_load(defaults.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        path = str(tiny_model(Path(folder)))
        # A model each: the engine and continuous batching both change how it computes attention.
        mine, second, third = (load(path, device(), options) for _ in range(3))
    loops = {
        "engine": own_engine(mine, options),
        "continuous_batching": continuous_batching(second),
        "generate": batched_generate(third),
    }
    table = {}
    for count in map(int, ask.requests.split(",")):
        draw = torch.Generator().manual_seed(count)
        lengths = torch.randint(ask.prompt * 4 // 5, ask.prompt * 6 // 5 + 1, (count,), generator=draw).tolist()
        prompts = [torch.randint(2048, (length,), generator=draw).tolist() for length in lengths]
        best: dict[str, float] = dict.fromkeys(loops, 0.0)
        for _ in range(ask.repeats):
            # Interleaved, so that a machine that is busy for a while is busy for all of them.
            for name, run in loops.items():
                begun = time.perf_counter()
                made = run(prompts, ask.tokens)
                assert made == count * ask.tokens, f"{name} made {made} tokens"
                best[name] = max(best[name], made / (time.perf_counter() - begun))
        others = max(speed for name, speed in best.items() if name != "engine")
        table[str(count)] = {**{name: round(speed) for name, speed in best.items()}, "ratio": best["engine"] / others}
    print(json.dumps({"prompt": ask.prompt, "tokens": ask.tokens, "tokens_per_second": table}))


if __name__ == "__main__":
    main()
