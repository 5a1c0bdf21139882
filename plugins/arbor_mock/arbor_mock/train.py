"""The trainer: every step is simulated; the data, the events, the checkpoints and the faults are real."""

import json
import math
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from msgspec import Struct

from arbor_core import Checkpoint, FileRun, JobFailed, JobStopped, ResumeClock, RowError, Run, read_rows

from .config import MockCommandsConfig, MockConfig, MockGrpoConfig
from .rows import words

ADAPTER = "adapter_model.safetensors"
STATE = "mock_state.json"


class Schedule(Struct, frozen=True):
    """What there is to do."""

    rows: int
    words: int
    epochs: int
    batch_size: int
    steps: int

    @property
    def steps_per_epoch(self) -> int:
        return max(1, math.ceil(self.steps / self.epochs))

    def words_until(self, step: int) -> int:
        """Words trained on in the first `step` steps: each epoch sees all of the file."""
        return round(self.words * self.epochs * step / self.steps)


def train(run: FileRun[MockConfig]) -> None:
    """Simulate a training job in a process of its own.

    Raises:
        JobFailed: the training file cannot be read, or `fault` says so.
        JobStopped: the job is to pause (a checkpoint was written) or was cancelled.
    """
    for seconds in steps(run, lambda number: os.kill(os.getpid(), number)):
        time.sleep(seconds)


def steps(run: FileRun[MockConfig], die: Callable[[int], None]) -> Iterator[float]:
    """The job step by step. Yields how many seconds to let pass before the next one.

    Args:
        die: Sends a signal to whatever runs the job.
    """
    plan = schedule(run)
    rate = run.config.learning_rate_multiplier
    run.resolved(
        n_epochs=plan.epochs,
        batch_size=plan.batch_size,
        learning_rate_multiplier=1.0 if rate == "auto" else rate,
    )
    clock, last = ResumeClock(run.config.resume_seconds), run.last_checkpoint()
    if last:
        run.message(f"Resumed after step {last.step}")
    for step in range(last.step + 1 if last else 1, plan.steps + 1):
        yield run.config.step_seconds
        values = measures(run, plan, step)
        run.metrics(step, plan.steps, **values)
        if step == plan.steps or step % (run.config.checkpoint_steps or plan.steps_per_epoch) == 0:
            with clock.writing():
                last = save(run, step, values)
        elif clock.is_due():
            with clock.writing():
                run.write_resume_point(step, partial(write, run, step))
        strike(run, step, die)
        try:
            run.stop_if_asked()
        except JobStopped as stop:
            if stop.desired == "pause" and (last is None or last.step < step):
                save(run, step, values)
            raise
    if last is None:
        raise JobFailed("There was nothing to train: the schedule has no steps", code="invalid_training_file")
    run.finish(last, plan.words_until(plan.steps), adapter=True)


def schedule(run: FileRun[MockConfig]) -> Schedule:
    """Read the training file and count; `auto` grows with the number of rows like OpenAI's does."""
    rows, total = count(run.training_file)
    config = run.config
    epochs = max(1, min(25, 100 // rows)) if config.n_epochs == "auto" else config.n_epochs
    size = max(1, min(256, rows // 500)) if config.batch_size == "auto" else config.batch_size
    return Schedule(rows, total, epochs, size, config.steps or math.ceil(rows / size) * epochs)


def count(path: Path) -> tuple[int, int]:
    """Rows of a file and the words in them to train on.

    Raises:
        JobFailed: `invalid_training_file`, with the line.
    """
    rows = total = 0
    try:
        for _, row in read_rows(path):
            rows, total = rows + 1, total + words(row)
    except RowError as error:
        raise JobFailed(str(error), code="invalid_training_file", param="training_file") from None
    if not rows:
        raise JobFailed("The training file has no rows", code="invalid_training_file", param="training_file")
    return rows, total


def measures(run: FileRun[MockConfig], plan: Schedule, step: int) -> dict[str, float]:
    """The numbers of a step: a function of (seed, step) and of nothing else."""
    noise = random.Random(f"{run.seed}/{step}").gauss(0.0, 0.02)
    loss = 0.2 + 2.3 / (1 + step / 8) + noise
    left = 1 - (step - 1) / plan.steps
    multiplier = run.config.learning_rate_multiplier
    values = {
        "train_loss": loss,
        "train_mean_token_accuracy": math.exp(-loss),
        "learning_rate": run.config.learning_rate * (1.0 if multiplier == "auto" else multiplier) * left,
    }
    if run.validation_file and (step % plan.steps_per_epoch == 0 or step == plan.steps):
        values |= {"valid_loss": loss + 0.05, "valid_mean_token_accuracy": math.exp(-loss - 0.05)}
    return values


def save(run: FileRun[MockConfig], step: int, values: dict[str, float]) -> Checkpoint:
    """Write a checkpoint with a small adapter in it."""
    metrics = {name: value for name, value in values.items() if name != "learning_rate"}
    with run.checkpoint(step, **metrics) as folder:
        write(run, step, folder)
    found = run.last_checkpoint()
    if found is None:
        raise JobFailed(f"The checkpoint of step {step} cannot be read back", code="checkpoint_corrupted")
    return found


def write(run: FileRun[MockConfig], step: int, folder: Path) -> None:
    """Write what there is after a step."""
    write_adapter(folder, run.model, f"{run.seed}/{step}/adapter")
    (folder / STATE).write_text(json.dumps({"step": step, "seed": run.seed}))


def write_adapter(folder: Path, model: str, seed: str) -> None:
    """Write a small adapter that any reader of safetensors can open."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (folder / ADAPTER).write_bytes(tensor_file(random.Random(seed)))


def tensor_file(numbers: random.Random) -> bytes:
    """A safetensors file of four numbers: the length of its header, the header, the data."""
    data = struct.pack("<4f", *(numbers.uniform(-1, 1) for _ in range(4)))
    name = "base_model.model.mock.lora_A.weight"
    header = json.dumps({name: {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


class DeviceLostError(RuntimeError):
    """What CUDA's runtime says when a GPU has fallen off the bus."""


def strike(run: Run[MockConfig | MockGrpoConfig | MockCommandsConfig], step: int, die: Callable[[int], None]) -> None:
    """Let go wrong what the configuration asks for, as often as it asks."""
    config = run.config
    struck = run.dir / "mock_faults"
    if config.fault == "none" or step != config.fault_step:
        return
    times = struck.stat().st_size if struck.exists() else 0
    if times >= config.fault_times:
        return
    with struck.open("ab") as file:
        file.write(b"x")
    if config.fault == "fail":
        raise JobFailed(f"The job was told to fail at step {step}", code="mock_failure")
    if config.fault == "lose_gpu":
        raise DeviceLostError("CUDA error: GPU is lost (simulated)")
    if config.fault == "out_of_memory":
        raise MemoryError("Tried to allocate 20.00 MiB (simulated)")
    if config.fault == "hang":
        die(signal.SIGSTOP)  # the heartbeat stops too, and only SIGKILL is heard
        return
    if config.fault == "bad_checkpoint" and (last := run.last_checkpoint()):
        (last.dir / ADAPTER).write_bytes(b"")
    die(signal.SIGKILL)
