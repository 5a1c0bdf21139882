"""Every path of a job's directory, once: `<storage>/jobs/<id>/`.

Server and worker speak through these files. What is written into them names no place on a machine: paths are relative
to the storage directory, so that it can be moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arbor_core.storage.atomic import create

CHECKPOINTS, WEIGHTS, INBOX, LEDGER, CHECKPOINT_REQUESTS = "checkpoints", "weights", "inbox", "ledger", "asked"
RESULTS = "results"


def checkpoint_path(job_id: str, name: str) -> str:
    """A checkpoint's directory as it is stored: relative to the storage directory."""
    return f"jobs/{job_id}/{CHECKPOINTS}/{name}"


@dataclass(frozen=True)
class JobDir:
    """A job's directory."""

    path: Path

    @classmethod
    def of(cls, storage: Path, job_id: str) -> JobDir:
        return cls(storage / "jobs" / job_id)

    @property
    def storage(self) -> Path:
        """The storage directory, to which stored paths are relative."""
        return self.path.parent.parent

    @property
    def document(self) -> Path:
        """`job.json`: written once, when the job is created."""
        return self.path / "job.json"

    @property
    def desired(self) -> Path:
        """What the job is to do now: one word, replaced as a whole."""
        return self.path / "desired"

    @property
    def checkpoints(self) -> Path:
        """`<step>-<attempt>/`, and links to them in `named/` and `held/`."""
        return self.path / CHECKPOINTS

    @property
    def resume_points(self) -> Path:
        """`<step>-<attempt>/`: what only the next attempt goes on from."""
        return self.path / "resume"

    @property
    def weights(self) -> Path:
        """`<version>-<attempt>/`: policies for engines."""
        return self.path / WEIGHTS

    @property
    def inbox(self) -> Path:
        """What clients send, groups of rollouts or commands, in order of arrival."""
        return self.path / INBOX

    @property
    def inbox_bell(self) -> Path:
        """Socket on which the trainer hears that something has come, or that something else is wanted of it."""
        return self.inbox / "bell"

    @property
    def results(self) -> Path:
        """What the trainer answers to commands, and up to where that was acknowledged."""
        return self.path / RESULTS

    @property
    def ledger(self) -> Path:
        """What the job's policies have sampled, by completion id."""
        return self.path / LEDGER

    @property
    def samples(self) -> Path:
        """Sampled rollouts for people to read."""
        return self.path / "samples"

    @property
    def checkpoint_requests(self) -> Path:
        """`<name>.json` for each checkpoint that a client waits for."""
        return self.path / CHECKPOINT_REQUESTS

    def attempt(self, number: int) -> AttemptDir:
        return AttemptDir(self.path / "attempts" / str(number))

    def attempts(self) -> list[AttemptDir]:
        """The attempts that have a directory, in their order."""
        folders = (self.path / "attempts").glob("[0-9]*")
        return [AttemptDir(path) for path in sorted(folders, key=lambda path: int(path.name))]


@dataclass(frozen=True)
class AttemptDir:
    """One attempt's part of a job's directory: `attempts/<n>/`."""

    path: Path

    @property
    def job(self) -> JobDir:
        return JobDir(self.path.parent.parent)

    @property
    def number(self) -> int:
        return int(self.path.name)

    @property
    def order(self) -> Path:
        """`order.json`: what is to be started."""
        return self.path / "order.json"

    @property
    def placement(self) -> Path:
        """`placement.json`: on which devices."""
        return self.path / "placement.json"

    @property
    def events(self) -> Path:
        """What rank 0 reports."""
        return self.path / "events.jsonl"

    @property
    def heartbeat(self) -> Path:
        """Touched while training makes progress."""
        return self.path / "heartbeat"

    @property
    def hung(self) -> Path:
        """There if the server ended the attempt because it made no progress: says for how long."""
        return self.path / "hung"

    @property
    def exit(self) -> Path:
        """`exit.json`: how it ended. Written by the supervisor when no process of the attempt lives."""
        return self.path / "exit.json"

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.path / "worker.log"

    @property
    def work(self) -> Path:
        """Scratch; gone when the attempt has ended."""
        return self.path / "work"

    @property
    def supervisor(self) -> Path:
        """The ref of the supervisor, which is made only once (`claim`)."""
        return self.path / "keeper"

    def claim(self, ref: str) -> str:
        """Claim the attempt for a supervisor; the ref of the one that has it: `ref`, or another that came first. Empty:
        the claim was revoked, and nobody may begin."""
        self.path.mkdir(parents=True, exist_ok=True)
        create(self.supervisor, ref.encode())
        return self.supervisor.read_text()

    def revoke_claim(self) -> str:
        """See to it that no supervisor begins from now on; the ref of the one that has begun. Empty: none has."""
        return self.claim("")
