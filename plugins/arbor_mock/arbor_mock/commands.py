"""The trainer that executes commands: it adds up numbers; the inbox, the results and the checkpoints are real."""

import random
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import Checkpoint, Command, CommandRun, JobFailed, JobStopped, ResumeClock

from .config import MockCommand, MockCommandsConfig
from .grpo import WAIT_SECONDS, kill
from .train import STATE, strike, write_adapter


class Published(msgspec.Struct, frozen=True):
    """The policy that engines serve."""

    version: int
    """The number of the command that published it."""
    digest: str


class Executed(msgspec.Struct):
    """The trainer after a number of commands: a function of them, and of nothing else."""

    command: int = 0
    """The last one that was executed."""
    sum: int = 0
    steps: int = 0
    """Numbers that were added."""
    digest: str = ""
    """Stands for the parameters: a hash over the numbers."""
    published: Published | None = None


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
        self.executed, self.clock = Executed(), ResumeClock(run.config.resume_seconds)
        if self.last:
            self.executed = msgspec.json.decode((self.last.dir / STATE).read_bytes(), type=Executed)
            run.message(f"Resumed after command {self.executed.command}")
            self.publish()  # what was sent may be gone

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
        published = self.executed.published and self.executed.published.version == command.number
        if published or (config.checkpoint_commands and command.number % config.checkpoint_commands == 0):
            self.saved()  # a policy that was published is served from here while no attempt runs
        elif self.clock.is_due():
            with self.clock.writing():
                self.run.write_resume_point(command.number, self.write_state)

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
            self.executed.published = Published(command.number, self.executed.digest)
            self.publish()
            return {"version": command.number}
        return {"sum": self.executed.sum}

    def add(self, number: int) -> None:
        """A step of training, so to speak."""
        before = self.executed
        digest = blake2b(f"{before.digest} {number}".encode(), digest_size=16).hexdigest()
        self.executed = Executed(before.command, before.sum + number, before.steps + 1, digest, before.published)
        loss = random.Random(digest).gauss(1.0, 0.02)
        self.run.metrics(self.executed.steps, self.executed.steps, digest, train_loss=loss)

    def publish(self) -> None:
        if policy := self.executed.published:
            self.run.send_policy(policy.version, self)

    module = None

    def write(self, folder: Path | None) -> None:
        """Write the policy, as a `PolicyWeights`."""
        if folder and self.executed.published:
            write_adapter(folder, self.run.model, self.executed.published.digest)

    def write_state(self, folder: Path) -> None:
        """Write what there is after the last command."""
        write_adapter(folder, self.run.model, self.executed.digest)
        (folder / STATE).write_bytes(msgspec.json.encode(self.executed))

    def saved(self) -> Checkpoint:
        """The checkpoint after the last command that was answered, written if there is none."""
        if self.last is None or self.last.resume_only or self.last.step != self.executed.command:
            with self.clock.writing(), self.run.checkpoint(self.executed.command) as folder:
                self.write_state(folder)
            self.last = self.run.last_checkpoint()
        if self.last is None:
            text = f"The checkpoint after command {self.executed.command} cannot be read back"
            raise JobFailed(text, code="checkpoint_corrupted")
        return self.last
