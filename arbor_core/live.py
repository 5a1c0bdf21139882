"""The jobs that learn from rollouts while they run: their sessions and ledgers, opened when first asked for."""

from __future__ import annotations

from pathlib import Path

import msgspec

from . import inbox
from .inbox import Group
from .ledger import Completion, Ledger
from .policies import policy_of
from .records import Job
from .rollouts import Accepted, Policy, Session
from .store import Store
from .types import TERMINAL, RolloutConfig


class _Named(msgspec.Struct):
    completions: tuple[str, ...] = ()


class _Spent(msgspec.Struct):
    """A group, as far as it says which completions it was made of."""

    rollouts: tuple[_Named, ...]


class Live:
    """One job's rollouts."""

    def __init__(self, store: Store, job: Job, root: Path) -> None:
        folder = root / "jobs" / job.id
        self.store, self.job_id = store, job.id
        self.config = msgspec.convert(job.spec.config, RolloutConfig)
        self.session = Session(folder / "inbox", self.config)
        self.ledger = Ledger(folder / "ledger")
        for completion in spent(folder / "inbox"):
            self.ledger.spend(reference(completion))

    @property
    def policy(self) -> Policy:
        """What the trainer has published and handled."""
        return policy_of(self.store, self.job_id)[0]

    def pending(self) -> list[int]:
        """The batch ids that a group may be sent for now."""
        return self.session.pending(self.policy)

    def sampled_at(self, batch_id: int) -> int:
        """The policy version of a group that does not say: that of its credit."""
        return self.session.sampled_at(batch_id, self.policy)

    async def send(self, group: Group, digest: int) -> Accepted:
        """Put a group into the inbox; see `Session.send`. The completions in it are spent from now on."""
        names = [reference(name) for rollout in group.rollouts for name in rollout.completions]
        self.ledger.spend(*names)  # before the first wait: a second group with one of them is refused meanwhile
        try:
            accepted = await self.session.send(group, digest, self.policy)
        except Exception:
            self.ledger.spent.difference_update(names)
            raise
        return accepted

    def completion(self, id: str, index: int = 0) -> Completion | None:
        """What was sampled under an id, if it is still known."""
        return self.ledger.get(id, index)

    def is_spent(self, id: str, index: int = 0) -> bool:
        """Whether a completion was rewarded already."""
        return (id, index) in self.ledger.spent

    def match(self, key: bytes, without: frozenset[tuple[str, int]] = frozenset()) -> Completion | None:
        """The newest completion with such messages and answer that is neither spent nor among `without`."""
        return self.ledger.match(key, without)

    def close(self) -> None:
        self.session.close()
        self.ledger.close()


class LiveJobs:
    """The open sessions of a server."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store, self.root = store, root
        self.open: dict[str, Live] = {}

    def of(self, job: Job) -> Live | None:
        """A job's rollouts; None where there are none to come: it learns from a file, or has ended."""
        if job.status in TERMINAL or not job.spec.rollouts:
            if ended := self.open.pop(job.id, None):
                ended.close()
            return None
        if job.id not in self.open:
            self.open[job.id] = Live(self.store, job, self.root)
        return self.open[job.id]

    def close(self) -> None:
        for live in self.open.values():
            live.close()


def spent(folder: Path) -> list[str]:
    """The completions that the groups in an inbox were made of."""
    found: list[str] = []
    for _, path in inbox.segments(folder):
        content = path.read_bytes()
        for offset, length, *_ in inbox.headers(path):
            begin = offset + inbox.HEADER.size
            group = msgspec.msgpack.decode(content[begin : begin + length], type=_Spent)
            found += [name for rollout in group.rollouts for name in rollout.completions]
    return found


def name_of(id: str, index: int) -> str:
    """A choice of a completion as a rollout names it."""
    return f"{id}#{index}" if index else id


def reference(name: str) -> tuple[str, int]:
    """What `name_of` was made of."""
    id, _, index = name.partition("#")  # noqa: A001
    return id, int(index or 0)
