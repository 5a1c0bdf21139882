"""The environment of the processes that a server starts: what they see of its own, and how many threads they use."""

from __future__ import annotations

import os
import re

from arbor_core.crash_points import below
from arbor_core.types import AttemptOrder, Placement

PASSED_ON = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_.*|TZ|TMPDIR|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|XDG_.*|SSL_.*|.*_PROXY|.*_proxy"
    r"|HF_.*|HUGGING_FACE_.*|TRANSFORMERS_.*|TORCH.*|PYTORCH_.*|CUDA_.*|NVIDIA_.*|NCCL_.*|VLLM_.*|WANDB_.*|COVERAGE_.*"
    r"|ARBOR_(?!.*KEY).*"
)
"""Variables of the server that its processes may see. This server's API keys and those of other services are not among
them."""


def clean_env() -> dict[str, str]:
    """The part of the server's environment that a worker or an engine may see."""
    return below({name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)})


def threads_env(threads: int) -> dict[str, str]:
    """Variables that keep several OpenMP processes from spinning on the same cores (a 0.1 s step became 5 s)."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }


def worker_env(order: AttemptOrder, placement: Placement) -> dict[str, str]:
    """The environment of an attempt's processes: what they may see of the server's, on which devices they run, and what
    their order adds."""
    gpus = [device.id for device in placement.devices if device.kind == "cuda"]
    seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return {**clean_env(), **threads_env(placement.threads), **seen, **order.env}
