"""LoRA adapters (Hu et al. 2021) applied row by row: requests for different adapters share a forward pass.

An adapter is read from a directory in PEFT's format. Its matrices stay beside the model, whose linear layers get a
hook that adds each row's own update; nothing is ever merged into the weights, so an adapter goes away with the last
sequence that holds it.

Shapes: R rank, I inputs and O outputs of a layer, B rows of the forward pass, N those of one adapter, T tokens.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from arbor_core.engine import ApiError

PREFIX = "base_model.model."
UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "lora_bias": "biases in the adapter (lora_bias)",
    "layer_replication": "replicated layers",
    "target_parameters": "updates of bare parameters (target_parameters)",
    "trainable_token_indices": "trained token embeddings",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "Monte Carlo LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
}
"""Keys of `adapter_config.json` that change what an adapter computes in a way that is not implemented here."""
NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "none", "")


class Ends(msgspec.Struct):
    """What is read of an adapter's `generation_config.json`."""

    eos_token_id: int | list[int] | None = None


@dataclass(eq=False)
class Adapter:
    """A loaded adapter: per module A [R, I] and B [O, R], the scaling already in B. `ends`: tokens that end
    its answers, beside the base model's."""

    name: str
    path: str
    layers: dict[str, tuple[Tensor, Tensor]]
    ends: frozenset[int] = frozenset()


def refuse(message: str, code: str = "invalid_adapter") -> ApiError:
    """A 400 about the adapter's directory."""
    return ApiError(400, message, code, "lora_path")


def load_adapter(name: str, path: str, model: PreTrainedModel) -> Adapter:
    """Read a PEFT adapter directory for a model.

    Raises:
        ApiError: it is not a LoRA adapter for this model, or does something that this engine cannot.
    """
    folder = Path(path)
    config = read_config(folder)
    modules = dict(model.named_modules())
    pairs = read_pairs(folder / "adapter_model.safetensors")
    layers = {}
    for module_name, pair in pairs.items():
        a_RI, b_OR = fitting(module_name, pair, modules.get(module_name))
        scaling = scaling_of(config, module_name, a_RI.shape[0])
        layers[module_name] = (
            a_RI.to(model.device, model.dtype),
            (b_OR.float() * scaling).to(model.device, model.dtype),
        )
    if not layers:
        raise refuse(f"the adapter at {path} holds no LoRA matrices")
    embeddings: Any = model.get_input_embeddings()
    return Adapter(name, path, layers, read_ends(folder, len(embeddings.weight)))


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, if it describes something that this engine computes."""
    try:
        config = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise refuse(f"cannot read {folder}/adapter_config.json ({error}); expected a PEFT adapter directory") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise refuse(f"adapters of type {kind} are not supported, only LORA", "unsupported_adapter")
    for key, what in UNSUPPORTED.items():
        if config.get(key) not in NEUTRAL:
            raise refuse(f"the adapter at {folder} uses {what}, which is not supported", "unsupported_adapter")
    if config.get("bias", "none") != "none":
        raise refuse(f"the adapter at {folder} trains biases; train it with bias='none'", "unsupported_adapter")
    return config


def read_ends(folder: Path, vocabulary: int) -> frozenset[int]:
    """`eos_token_id` of the adapter's `generation_config.json`, if it has one: training may have taught another end of
    turn than its base model knows."""
    file = folder / "generation_config.json"
    if not file.exists():
        return frozenset()
    try:
        ids = msgspec.json.decode(file.read_bytes(), type=Ends).eos_token_id
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refuse(f"cannot read {file} ({error}); expected eos_token_id to be a token or a list of them") from None
    ends = [ids] if isinstance(ids, int) else ids or []
    if not all(0 <= token < vocabulary for token in ends):
        raise refuse(f"eos_token_id in {file} is {ids}; expected tokens in 0..{vocabulary - 1}")
    return frozenset(ends)


def read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    """Module name -> {"A": ..., "B": ...} of a safetensors file."""
    pairs: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(str(file), "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight", key.removeprefix(PREFIX))
                if match is None:
                    raise refuse(
                        f"tensor {key} in {file} is not a LoRA matrix of a linear layer", "unsupported_adapter"
                    )
                pairs.setdefault(match[1], {})[match[2]] = tensors.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise refuse(f"cannot read {file}: {error}") from None
    return pairs


def fitting(name: str, pair: dict[str, Tensor], module: nn.Module | None) -> tuple[Tensor, Tensor]:
    """A and B, checked against the module they update."""
    if not isinstance(module, nn.Linear | Conv1D):
        actual = "no such module" if module is None else type(module).__name__
        raise refuse(f"the adapter updates {name}, but the base model has there: {actual}")
    if set(pair) != {"A", "B"}:
        raise refuse(f"the adapter holds only matrix {'/'.join(pair)} for {name}; expected A and B")
    a_RI, b_OR = pair["A"], pair["B"]
    inside, outside = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
    expected = ((a_RI.shape[0], inside), (outside, a_RI.shape[0]))
    if (tuple(a_RI.shape), tuple(b_OR.shape)) != expected:
        shapes = f"{tuple(a_RI.shape)} and {tuple(b_OR.shape)}"
        raise refuse(f"the adapter's matrices for {name} are {shapes}, expected {expected[0]} and {expected[1]}")
    if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
        raise refuse(f"the adapter's matrices for {name} hold NaN or infinity")
    return a_RI, b_OR


def scaling_of(config: dict[str, Any], module_name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module_name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


class AdapterRows:
    """Which rows of the forward pass in progress belong to which adapter, and the hooks that look it up."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = dict(model.named_modules())
        self.hooked: set[str] = set()
        self.groups: list[tuple[Adapter, Tensor | None]] = []
        """Adapter -> its rows [N]; None: all of them."""
        self.count = 0
        self.device = model.device

    def attach(self, adapter: Adapter) -> None:
        """Hook the layers that an adapter updates. Only between forward passes."""
        for name in adapter.layers.keys() - self.hooked:
            self.modules[name].register_forward_hook(self._hook(name))
            self.hooked.add(name)

    @contextmanager
    def of(self, adapters: Sequence[Adapter | None]) -> Iterator[None]:
        """For one forward pass, whose rows want these adapters."""
        rows: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(adapters):
            if adapter is not None:
                rows.setdefault(adapter, []).append(row)
        self.count = len(adapters)
        self.groups = [
            (adapter, None if len(own) == self.count else torch.tensor(own, device=self.device))
            for adapter, own in rows.items()
        ]
        try:
            yield
        finally:
            self.groups = []

    def _hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in self.groups:
                matrices = adapter.layers.get(name)
                if matrices is not None:
                    output = self._added(inputs[0], output, *matrices, rows)
            return output

        return add

    def _added(self, x_BTI: Tensor, y_BTO: Tensor, a_RI: Tensor, b_OR: Tensor, rows_N: Tensor | None) -> Tensor:
        if rows_N is None:
            return y_BTO + (x_BTI @ a_RI.T) @ b_OR.T
        if len(x_BTI) != self.count:
            # Some layers see [B * T, I].
            parts = x_BTI.view(self.count, -1, x_BTI.shape[-1]), y_BTO.view(self.count, -1, y_BTO.shape[-1])
            return self._added(*parts, a_RI, b_OR, rows_N).view_as(y_BTO)
        return y_BTO.index_add(0, rows_N, (x_BTI[rows_N] @ a_RI.T) @ b_OR.T)
