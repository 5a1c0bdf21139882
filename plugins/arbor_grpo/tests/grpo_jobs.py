"""Groups with ragged rollouts, and jobs that are run in this process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arbor_grpo.train import compose
from arbor_grpo.training.session import Session
from arbor_grpo.training.trainer import GroupTrainer
from arbor_sft.tiny import tokenizer

from arbor_core.testing import JobDirectory
from arbor_core.testing.job_directory import ENV
from arbor_core.types import ErrorEvent, Event, Group, MetricsEvent, Rollout
from arbor_core.worker.main import main
from arbor_core.worker.rollout_run import RolloutWorkerRun
from arbor_core.worker.run import open_run

LETTERS = range(97, 123)
FULL: dict[str, Any] = {"lora": None}
QUICK: dict[str, Any] = {"learning_rate": 3e-3, "max_staleness": 64, "groups_per_step": 2, "lora": {"dropout": 0.1}}
"""A high rate, so that steps differ; dropout, so that random states matter."""
WAIT_SECONDS = 60


def ids(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, dtype="<i4").tobytes()


def floats(numbers: Sequence[float]) -> bytes:
    return np.array(numbers, dtype="<f4").tobytes()


def rollout(trajectory: int, prompt: Sequence[int], completion: Sequence[int], reward: float, **more: Any) -> Rollout:
    """Tokens; the sampler's log-probabilities are about those of a uniform policy over the letters."""
    dice = random.Random(f"{completion} {trajectory}")
    more.setdefault("logprobs", floats([-3.2 - dice.random() for _ in completion]))
    return Rollout(trajectory=trajectory, prompt=ids(prompt), completion=ids(completion), reward=reward, **more)


def group(seed: int, *, size: int = 4, version: int = 0, **more: Any) -> Group:
    """Rollouts of 0 to 12 tokens on one prompt; every third has tokens of the environment in it."""
    dice = random.Random(seed)
    prompt = [dice.choice(LETTERS) for _ in range(dice.randrange(2, 20))]
    rollouts = []
    for number in range(size):
        completion = [dice.choice(LETTERS) for _ in range(dice.randrange(1, 13) if number else 0)]
        mask = bytes(at % 3 != 1 for at in range(len(completion))) if number % 3 == 2 else b""
        rollouts.append(rollout(number, prompt, completion, dice.random(), mask=mask, truncated=number == 1))
    return Group(id=seed, rollouts=tuple(rollouts), version=version, **more)


def groups(count: int, start: int = 0) -> list[Group]:
    return [group(n) for n in range(start, start + count)]


def write_model(path: Path, config_type: Any, model_type: Any, **settings: Any) -> Path:
    """A model that reads bytes, with weights large enough to have opinions; its directory."""
    words = tokenizer(256)
    config = config_type(
        vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, **settings
    )
    torch.manual_seed(0)
    model_type(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


TWO_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}


class Job(JobDirectory):
    """A job whose attempts run in this process: importing the libraries takes longer than training."""

    def open(self) -> RolloutWorkerRun[Any]:
        return open_run(self.prepare(), RolloutWorkerRun)

    def session(self) -> Session:
        """A new attempt, before its first step."""
        return compose(self.open())

    def composed(self) -> GroupTrainer:
        """The trainer of a new attempt, before its first step."""
        return self.session().trainer

    def run(self) -> int:
        return main(self.prepare())

    def must(self) -> Job:
        assert self.run() == 0, [event.message for event in self.events(ErrorEvent)]
        return self

    def digests(self) -> dict[int, str]:
        """Of all attempts, each step's newest."""
        found = {}
        for attempt in range(1, self.attempts + 1):
            found |= {event.step: event.data["digest"] for event in self.events(MetricsEvent, attempt=attempt)}
        return found


def step(trainer: GroupTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the next batch."""
    trainer.policy.zero_grad()
    loss = float(trainer.training_step(trainer.model, []))
    return loss, {n: p.grad.clone() for n, p in trainer.policy.named_parameters() if p.grad is not None}


def two_ranks(job: Job) -> None:
    """A new attempt of two processes on this machine; it must succeed."""
    folder = job.prepare()
    torchrun = [sys.executable, "-m", "arbor_core.worker.torchrun", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "arbor_core.worker.main", str(folder)]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENV})
    try:
        assert process.wait(300) == 0, job.log
    finally:
        process.terminate()
        process.wait()


class Background:
    """An attempt in a thread, for a test that has to say something to it meanwhile."""

    def __init__(self, job: Job) -> None:
        self.job, self.code = job, -1
        folder = job.prepare()
        self.thread = threading.Thread(target=lambda: setattr(self, "code", main(folder)), daemon=True)
        self.thread.start()

    def until(self, kind: type[Event], count: int = 1) -> None:
        """Wait until it has reported so many events of a kind."""
        end = time.monotonic() + WAIT_SECONDS
        while len(self.job.events(kind)) < count:
            assert self.thread.is_alive(), [event.message for event in self.job.events()]
            assert time.monotonic() < end, f"no {kind.__name__}: {[event.message for event in self.job.events()]}"
            time.sleep(0.01)

    def end(self) -> int:
        self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()
        return self.code
