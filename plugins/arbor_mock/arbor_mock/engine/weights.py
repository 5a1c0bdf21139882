"""What the simulated engine looks for in directories of weights: as much as tells whole files from broken ones."""

import json
from pathlib import Path


def check_adapter(folder: Path) -> None:
    """Whether a directory can be one of a PEFT adapter.

    Raises:
        ValueError, OSError: it cannot.
    """
    json.loads((folder / "adapter_config.json").read_bytes())
    check_tensors(folder / "adapter_model.safetensors")


def check_tensors(path: Path) -> None:
    """Whether a file can be one of safetensors.

    Raises:
        ValueError: its header is cut off or is not JSON.
    """
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or len(raw) < 8 + length:
        raise ValueError(f"{path.name} is cut off at {len(raw)} bytes")
    json.loads(raw[8 : 8 + length])
