"""New weights for a model that runs: read and checked beside it, then copied into it between two turns."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from arbor_core.engine import ApiError

Pair = tuple[Tensor, Tensor]
"""A tensor of the model, and what is to be in it: of the same shape."""


def refuse(message: str) -> ApiError:
    return ApiError(400, message, "invalid_weights", "path")


def read_weights(path: str, model: PreTrainedModel) -> list[Pair]:
    """What every tensor of a model is in a directory's safetensors files, which are read when the pairs are copied.

    Raises:
        ApiError: they are not all of this model's weights and nothing else, by its own names.
    """
    own: dict[str, Tensor] = model.state_dict()
    new: dict[str, Tensor] = {}
    files = sorted(Path(path).glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(str(file), "pt") as tensors:
                new |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise refuse(f"cannot read the weights in {path}: {error}") from None
    for name, tensor in new.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such tensor"
            raise refuse(f"{path} holds {name} {tuple(tensor.shape)}, but the model has there: {shape}")
    covered = {own[name].data_ptr() for name in new}
    if missing := [name for name, tensor in own.items() if tensor.data_ptr() not in covered]:  # tied ones share
        raise refuse(f"the weights in {path} lack {len(missing)} tensors of the model, {missing[0]} among them")
    return [(own[name], tensor) for name, tensor in new.items()]


def copy_weights(pairs: list[Pair]) -> None:
    """Copy new weights into the model's tensors, whatever their types and devices."""
    for own, new in pairs:
        own.copy_(new)
