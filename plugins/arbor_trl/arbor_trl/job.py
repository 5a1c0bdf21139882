"""What every job on TRL does around its training, whatever the method: the process, TRL's arguments, the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import is_deepspeed_available
from torch import distributed, nn
from transformers.utils import logging

from arbor_core import Checkpoint, Desired, JobFailed, JobStopped, Run

from . import LoraSettings
from .model import autocast, uses_cuda

if is_deepspeed_available():  # accelerate would import it in the first step, after a warm process was forked
    import_module("deepspeed")

BY_STRENGTH: tuple[Desired, ...] = ("run", "pause", "cancel")


@contextmanager
def process_group() -> Iterator[None]:
    """Leave the group of ranks when the block ends: its threads must not be running when the interpreter goes."""
    try:
        yield
    finally:
        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def set_up(run: Run[Any]) -> None:
    """Threads, seed and logging of this process.

    Raises:
        JobFailed: `launcher_unsuitable`: it is alone with several GPUs. transformers would split each micro-batch among
            them, and every step would be another one than was planned.
    """
    if run.world_size == 1 and len(run.devices) > 1 and uses_cuda(run):
        raise JobFailed(
            f"this method trains on {len(run.devices)} GPUs in as many processes, but the server starts one for all "
            "(launcher=none): start it with launcher=torchrun, or train on one GPU",
            code="launcher_unsuitable",
        )
    torch.set_num_threads(run.threads)
    transformers.set_seed(run.seed % 2**32)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def trl_arguments(run: Run[Any]) -> dict[str, Any]:
    """Arguments of TRL's trainers that are the same for all methods. Checkpoints, evaluation and reports are ours."""
    return {
        "output_dir": str(run.work / "trainer"),
        "bf16": autocast(run),
        "use_cpu": not uses_cuda(run),
        "dataloader_pin_memory": uses_cuda(run),
        "seed": run.seed % 2**32,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
    }


@contextmanager
def lora_errors(settings: LoraSettings | None) -> Iterator[None]:
    """Say that the adapter's settings are wrong where PEFT cannot use them.

    Raises:
        JobFailed: `invalid_hyperparameters`.
    """
    try:
        yield
    except ValueError as error:  # PEFT finds no such module
        if settings is None:
            raise
        raise JobFailed(f"lora: {error}", code="invalid_hyperparameters", param="hyperparameters") from error


def parameter_counts(model: nn.Module) -> str:
    """How many parameters are trained, and on what, for the job's events."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    count = sum(parameter.numel() for parameter in parameters)
    return f"Training {trained:,} of {count:,} parameters on {parameters[0].device.type}"


def agreed_stop(run: Run[Any], accelerator: Accelerator | None) -> JobStopped | None:
    """Whether to stop: of what the ranks have read, the strongest, because one that stopped alone would leave the
    others waiting. None: to go on."""
    try:
        run.stop_if_asked()
        stop = None
    except JobStopped as error:
        stop = error
    if accelerator is None or run.world_size == 1:
        return stop
    mine = torch.tensor([BY_STRENGTH.index(stop.desired if stop else "run")], device=accelerator.device)
    strongest = BY_STRENGTH[int(accelerator.gather(mine).max())]
    return None if strongest == "run" else JobStopped(strongest)


def agreed(mine: bool, run: Run[Any], accelerator: Accelerator) -> bool:
    """What rank 0 has decided, on every rank."""
    if run.world_size == 1:
        return mine
    decision = torch.tensor([mine], dtype=torch.int32, device=accelerator.device)
    return bool(accelerator.gather(decision)[0])


def result_of(run: Run[Any], step: int) -> Checkpoint:
    """The checkpoint of the step whose model is the job's result.

    Raises:
        JobFailed: `checkpoint_lost`.
    """
    newest = run.last_checkpoint()
    found = newest if newest and newest.step == step else run.checkpoint_of(step)
    if found is None:
        whole = f"that of step {newest.step}" if newest else "none"
        raise JobFailed(
            f"the checkpoint of step {step}, the result, is lost; the newest whole one is {whole}",
            code="checkpoint_lost",
        )
    return found


def prove() -> None:
    """Proof that a warm process can train, called in a test fork before any job's worker is forked: forward, backward
    and one optimizer step of a small network, on a GPU where there is one.

    Raises:
        RuntimeError: the gradient or the loss is not a number; or whatever the libraries raise.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(network(torch.ones(32, 64, device=device)), torch.arange(32, device=device) % 8)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in network.parameters()]
    optimizer.step()
    if not torch.isfinite(loss) or any(g is None or not torch.isfinite(g).all() for g in gradients):
        raise RuntimeError(f"a test step on {device} gave the loss {loss.item()} or a gradient that is not a number")
