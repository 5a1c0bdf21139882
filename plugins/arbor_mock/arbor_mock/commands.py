"""The trainer that executes commands: it adds up numbers; the inbox, the results and the checkpoints are real."""

import json
import random
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import Checkpoint, Command, CommandRun, JobFailed, JobStopped

from .config import MockCommand, MockCommandsConfig
from .grpo import WAIT_SECONDS, kill
from .train import ADAPTER, STATE, strike, tensor_file


class Executed(msgspec.Struct):
    """The trainer after a number of commands: a function of them, and of nothing else."""

    command: int = 0
    """The last one that was executed."""
    sum: int = 0
    steps: int = 0
    """Numbers that were added."""
    digest: str = ""
    """Stands for the parameters: a hash over the numbers."""


def train(run: CommandRun[MockCommandsConfig]) -> None:
    """Execute the commands that clients send, in a process of its own.

    Raises:
        JobFailed: `fault` says so, or a checkpoint cannot be read back.
        JobStopped: the job is to pause (a checkpoint was written) or was cancelled.
    """
    executor = Executor(run)
    strike(run, executor.executed.command, kill)
    while run.desired() != "finish":
        executor.serve_requests()
        for command in run.commands(executor.executed.command, WAIT_SECONDS):
            executor.execute(command)
    run.finish(executor.saved(), trained_tokens=max(1, executor.executed.steps), adapter=True)


class Executor:
    """The state of one attempt."""

    def __init__(self, run: CommandRun[MockCommandsConfig]) -> None:
        self.run, self.last = run, run.last_checkpoint()
        self.executed = Executed()
        if self.last:
            self.executed = msgspec.json.decode((self.last.dir / STATE).read_bytes(), type=Executed)
            run.message(f"Resumed after command {self.executed.command}")

    def serve_requests(self) -> None:
        """Name the checkpoints that clients wait for; pause or stop where that is wanted."""
        for request in self.run.asked_checkpoints():
            self.saved()
            self.run.name_checkpoint(request, self.executed.command)
        try:
            self.run.stop_if_asked()
        except JobStopped as stop:
            if stop.desired == "pause":
                self.saved()
            raise

    def execute(self, command: Command) -> None:
        """Execute a command and answer it; only then may a checkpoint include it."""
        config = self.run.config
        time.sleep(config.step_seconds)
        answer = self.answer(command)
        self.executed.command = command.number
        self.run.result(command, msgspec.json.encode(answer))
        strike(self.run, command.number, kill)
        if config.checkpoint_commands and command.number % config.checkpoint_commands == 0:
            self.saved()

    def answer(self, command: Command) -> dict[str, Any]:
        """Do what a command says; what it answers."""
        try:
            wanted = msgspec.json.decode(command.payload, type=MockCommand)
        except msgspec.DecodeError as error:
            return {"error": str(error)}
        if wanted.do == "add":
            self.add(wanted.n)
        elif wanted.do == "checkpoint":  # of the commands before this one: it is not answered yet
            return {"step": self.saved().step}
        elif wanted.do == "publish":
            with self.run.publish(command.number) as folder:
                write(folder, self.run.model, self.executed)
            return {"version": command.number}
        return {"sum": self.executed.sum}

    def add(self, number: int) -> None:
        """A step of training, so to speak."""
        before = self.executed
        digest = blake2b(f"{before.digest} {number}".encode(), digest_size=16).hexdigest()
        self.executed = Executed(before.command, before.sum + number, before.steps + 1, digest)
        loss = random.Random(digest).gauss(1.0, 0.02)
        self.run.metrics(self.executed.steps, self.executed.steps, digest, train_loss=loss)

    def saved(self) -> Checkpoint:
        """The checkpoint after the last command that was answered, written if there is none."""
        if self.last is None or self.last.step != self.executed.command:
            with self.run.checkpoint(self.executed.command) as folder:
                write(folder, self.run.model, self.executed)
            self.last = self.run.last_checkpoint()
        if self.last is None:
            text = f"The checkpoint after command {self.executed.command} cannot be read back"
            raise JobFailed(text, code="checkpoint_corrupted")
        return self.last


def write(folder: Path, model: str, executed: Executed) -> None:
    """A small adapter that any reader of safetensors can open, and what the trainer goes on from."""
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": model, "r": 1}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (folder / ADAPTER).write_bytes(tensor_file(random.Random(executed.digest)))
    (folder / STATE).write_bytes(msgspec.json.encode(executed))
