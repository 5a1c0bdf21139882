"""What the function of a trainer that executes commands is handed (`arbor_core.types.CommandRun`)."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from arbor_core.jobdir.results import Results
from arbor_core.process.resources import is_disk_full
from arbor_core.process.wakeup import ANSWERED, wake
from arbor_core.types import CheckpointRequest, Command, ConfigT, Desired, PolicyWeights

from .inbox_reader import CommandFeed
from .live_run import LiveWorkerRun

RETRY_SECONDS = 1.0
"""How often a worker tries again to write a result that the disk had no room for."""


@dataclass
class CommandWorkerRun(LiveWorkerRun[ConfigT]):
    """A run with an inbox of commands, and a log of their results. Only rank 0 has them."""

    executed: int | None = field(init=False, default=None)
    """The last command that was executed, as far as the trainer has said; None: it has not begun."""
    gap_told: bool = field(init=False, default=False)

    @cached_property
    def feed(self) -> CommandFeed:
        return CommandFeed(self.job_files.inbox)

    @cached_property
    def results(self) -> Results:
        return Results(self.job_files.results)

    def commands(self, after: int, wait: float) -> list[Command]:
        if self.executed is None and (missing := self.behind + 1) <= after:
            raise RuntimeError(
                f"the trainer goes on after command {after}, and command {missing} has no result: answer a command "
                "before you write a checkpoint that includes it"
            )
        self.executed = max(self.executed or 0, after)
        self.heartbeat.beat()  # ready, though nobody may send anything for days
        return self.feed.take(after, wait)

    def result(self, command: Command, payload: bytes) -> bool:
        if self.rank:
            return False
        written = self._write(command, payload)
        if written:
            wake(self.bell, self.job_id + ANSWERED)
        elif self.results.differs(command.number, payload):
            text = f"Command {command.number} was executed again with another result than before: the first one stands"
            self.message(text, "warn")
        self.executed = max(self.executed or 0, command.number)
        self.heartbeat.beat()
        return written

    def _write(self, command: Command, payload: bytes) -> bool:
        """Write a result; waits while the disk is full. False: there is one, which stands."""
        until = time.monotonic() + self.room_seconds
        while True:
            try:
                return self.results.answer(command, payload)
            except OSError as error:
                if time.monotonic() > until or not is_disk_full(error, self.dir):
                    raise
            self.heartbeat.beat_if_started()
            time.sleep(RETRY_SECONDS)

    def is_answered(self, number: int) -> bool:
        return number in self.results.answered

    def publish(self, version: int) -> AbstractContextManager[Path]:
        return self.publishing(version, 0)

    def send_policy(self, version: int, weights: PolicyWeights) -> None:
        self.sending(version, 0, weights)

    @cached_property
    def behind(self) -> int:
        """The last command that earlier attempts have answered, with all before it."""
        return self.results.answered.until

    def asked_checkpoints(self) -> list[CheckpointRequest]:
        if (
            self.rank == 0 and (self.executed or 0) < self.behind
        ):  # clients have been told more than the trainer has done again
            return []
        return super().asked_checkpoints()

    def desired(self) -> Desired:
        wanted = super().desired()
        if wanted == "finish" and self.rank == 0:
            taken = self.feed.taken
            if (self.executed or 0) < taken or self.feed.has(taken + 1):
                return "run"
            self._tell_of_gap(taken + 1)
        return wanted

    def _tell_of_gap(self, missing: int) -> None:
        """Say once which commands are not executed, because one before them never came."""
        later = sorted(number for number in self.feed.places if number > missing)
        if later and not self.gap_told:
            self.gap_told = True
            shown = ", ".join(map(str, later[:10]))
            text = f"Command {missing} never came: {len(later)} after it are not executed ({shown})"
            self.message(text, "warn")
