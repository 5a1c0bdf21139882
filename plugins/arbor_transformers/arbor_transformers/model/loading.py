"""Loading a model, and finding out how it can be batched.

Shapes: B sequences, T tokens, V vocabulary.
"""

import copy
import logging
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, get_layer_types_and_kwargs
from transformers.modeling_utils import PreTrainedModel

from arbor_core import ArborError, Device
from arbor_core.engine import Progress
from arbor_transformers import Options

from .attention import use_grouped_attention
from .batch import Batch, EvenBatch, SlotBatch, even_forward
from .lora import AdapterRows
from .slots import COLUMNS, SlotForward

log = logging.getLogger(__name__)
UNBOUNDED = 32768
"""Context of a model whose configuration names no limit."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to serve. Tokenizers are not for several threads at once, so each that needs one has its own."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_of_loop: PreTrainedTokenizerBase
    tokenizer_of_answers: PreTrainedTokenizerBase
    ends: frozenset[int]
    """Tokens that end an answer."""
    vocabulary: int
    """Ids from there on do not exist."""
    context: int


def load(path: str, device: Device, options: Options) -> Loaded:
    """Load weights (safetensors only) and tokenizer, never running code that comes with them.

    Raises:
        ArborError: what is at the path cannot be served; the message says why.
    """
    local = is_directory(path)
    place = torch.device("cuda", device.index) if device.kind == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
        if options.share < 1:
            torch.cuda.set_per_process_memory_fraction(options.share, place)
    dtype = options.dtype if options.dtype != "auto" else ("bfloat16" if place.type == "cuda" else "float32")
    try:
        model = load_weights(path, local, getattr(torch, dtype), options.attention)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=local)
        model.to(place)  # type: ignore[arg-type]
        model.eval().requires_grad_(False)  # type: ignore[no-untyped-call]
    except ArborError:
        raise
    except Exception as error:
        # The libraries raise nearly everything here; the process has nothing else to do.
        log.debug("loading failed", exc_info=True)
        reason = " ".join(str(error).split())
        raise ArborError(f"cannot load a model from {path}: {type(error).__name__}: {reason}") from None
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        tokenizer_of_loop=copy.deepcopy(tokenizer),
        tokenizer_of_answers=copy.deepcopy(tokenizer),
        ends=ends_of(model, tokenizer),
        vocabulary=vocabulary_of(model),
        context=context_of(model, tokenizer),
    )


def load_weights(path: str, local: bool, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model itself, every tensor of it from the files."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=local)
    described = config.get_text_config()
    if (getattr(described, "pad_token_id", None) or 0) >= getattr(described, "vocab_size", math.inf):
        described.pad_token_id = None  # nothing is padded with it here, and torch would refuse the embedding
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        trust_remote_code=False,
        local_files_only=local,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation=None if attention == "auto" else attention,
        output_loading_info=True,
    )
    model, report = loaded
    if report["missing_keys"]:
        # Without this they would be random.
        missing = sorted(report["missing_keys"])
        raise ArborError(f"the weights in {path} lack {len(missing)} tensors of its model, {missing[0]} among them")
    return cast("PreTrainedModel", model)


def is_directory(path: str) -> bool:
    """Whether a path is a directory; False for a hub id.

    Raises:
        ArborError: it is written like a directory and there is none: asking the hub for it would only take long.
    """
    if Path(path).is_dir():
        return True
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ArborError(f"cannot load a model from {path}: there is no such directory")
    return False


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that the model's files call an end, of those it can produce."""
    ends: set[int] = set()
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        ends |= {value} if isinstance(value, int) else set(value or ())
    return frozenset(token for token in ends if token < vocabulary_of(model))


def vocabulary_of(model: PreTrainedModel) -> int:
    """Ids that can be both read and written: rows of the embedding matrices."""
    matrices: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    return min(len(matrix.weight) for matrix in matrices if matrix is not None)


def context_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model can look at."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None and tokenizer.model_max_length < 1 << 30:
        limit = tokenizer.model_max_length
    return int(limit or UNBOUNDED)


def make_batch(loaded: Loaded, lora: AdapterRows, options: Options) -> tuple[Batch, int]:
    """The best batch for this model, and the tokens that one sequence may have in it.

    Raises:
        ArborError: none gives the model's own logits.
    """
    model = loaded.model
    cells = options.max_cached_tokens or cells_that_fit(model, options.max_batch * loaded.context, options.share)
    cells = max(cells // COLUMNS * COLUMNS, COLUMNS)
    even = EvenBatch(model, lora, options.max_batch, cells)
    forward = slot_forward(model)
    batches: list[Batch] = [even]
    if forward is not None:
        batches.insert(0, SlotBatch(forward, lora, options.max_batch, cells, options.prefill_tokens))
    expected_BTV = reference(model)
    if not expected_BTV.isfinite().all():
        raise ArborError("the model's output is not a number (NaN or infinite): its weights have diverged")
    use_grouped_attention(model)
    for batch in batches:
        if proves(batch, expected_BTV):
            log.info("batching with %s, %d tokens cached at most", type(batch).__name__, cells)
            return batch, min(loaded.context, cells - 1)
    raise ArborError(f"the embedded engine cannot serve {type(model).__name__}: its cache gives other logits than none")


def mark_progress(model: PreTrainedModel, progress: Progress) -> None:
    """Have every layer (a member of a list of modules) mark progress before it runs, as the loop does once a turn: a
    turn takes minutes where a large model reads a long prompt on few cores."""

    def mark(*_: Any) -> None:
        progress.mark()

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                layer.register_forward_pre_hook(mark)


def slot_forward(model: PreTrainedModel) -> SlotForward | None:
    """How to run a model over slots; None where its layers keep something else than keys and values by position."""
    config = model.config.get_text_config(decoder=True)
    described: tuple[list[str], Any] = get_layer_types_and_kwargs(config)
    types, details = described
    if isinstance(details, dict):  # transformers before 5.19 tells it of all layers at once
        details = [details]
    scaling: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    # These stretch positions by the longest row of a batch: rows would depend on one another.
    stretched = any(kind in str(scaling) for kind in ("'dynamic'", "'longrope'"))
    windows = {detail["sliding_window"] for detail in details if "sliding_window" in detail}
    if stretched or len(windows) > 1 or not set(types) <= {"full_attention", "sliding_attention"}:
        return None
    return SlotForward(model, types, next(iter(windows), None))


PROOF = [[(7 * i + 3 * row) % 100 for i in range(9)] for row in range(2)]
"""Two prompts whose continuation is compared with and without a cache."""


@torch.inference_mode()
def reference(model: PreTrainedModel) -> torch.Tensor:
    """Logits [B = 3, T, V] of the three sequences of `proves`, from the model alone."""
    texts = [[*PROOF[row > 0], row + 1, 4] for row in range(3)]
    ids_BT = torch.tensor(texts, device=model.device) % vocabulary_of(model)
    logits_BTV: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits_BTV


@torch.inference_mode()
def proves(batch: Batch, expected_BTV: torch.Tensor) -> bool:
    """Whether a batch gives the model's own logits: prefill, rows side by side, decoding, dropping. Leaves it empty."""
    try:
        prefill = batch.prefill(
            [[token % expected_BTV.shape[-1] for token in prompt] for prompt in PROOF], [None, None]
        )
        while not prefill.advance():
            pass
        seen = [batch.admit(prefill, [0, 1, 1]), batch.step([1, 2, 3])]
        order = batch.drop({0})
        seen.append(batch.step([4] * len(order)))
    except Exception:
        # A model outside of what a batch was written for fails in ways of its own; then another batch is tried.
        log.info("%s does not run this model", type(batch).__name__, exc_info=True)
        return False
    finally:
        batch.clear()
    right = [expected_BTV[:, -3], expected_BTV[:, -2], expected_BTV[order, -1]]
    return all(close(mine, theirs) for mine, theirs in zip(seen, right, strict=True))


def close(mine_BV: torch.Tensor, theirs_BV: torch.Tensor) -> bool:
    """Whether logits agree as far as their number format lets them, relative to how far apart they lie."""
    tolerance = 1e-3 if theirs_BV.dtype == torch.float32 else 0.05
    mine_BV, theirs_BV = mine_BV.float(), theirs_BV.float()
    return bool((mine_BV - theirs_BV).norm() <= tolerance * theirs_BV.norm())


def cells_that_fit(model: PreTrainedModel, useful: int, share: float) -> int:
    """Cached tokens for which there is memory: 60 % of the GPU's that is free, or a quarter of the machine's.

    Args:
        useful: No more than that.
        share: Part of the GPU's memory that this process may take.
    """
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        even_forward(model, torch.zeros(1, COLUMNS, dtype=torch.long, device=model.device), cache, 0)
    tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    per_token = max(1, sum(tensor.nbytes for tensor in tensors) // COLUMNS)
    return max(COLUMNS, min(useful, free_bytes(model.device, share) // per_token))


def free_bytes(device: torch.device, share: float) -> int:
    """Bytes that the cache may take."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        ours = total * share - torch.cuda.memory_reserved(device) if share < 1 else free
        return max(0, int(min(free, ours) * 0.6))
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s+(\d+) kB", read_text(Path("/proc/meminfo")))
    bounds = [int(available[1]) * 1024 if available else pages]
    limit = read_text(Path("/sys/fs/cgroup/memory.max")).strip()
    if limit.isdecimal():
        # A container's limit, where there is one: what the machine has free says nothing then.
        bounds.append(int(limit) - int(read_text(Path("/sys/fs/cgroup/memory.current"))))
    return max(0, min(bounds) // 4)


def read_text(file: Path) -> str:
    """A file of the kernel's, empty where this kernel has none."""
    return file.read_text() if file.exists() else ""
