"""What the routes of plugins may use of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from .jobs import Desired

if TYPE_CHECKING:
    from .commands import CommandSession
    from .rollouts import Accepted, Completion, Group, Policy, RolloutConfig


class NamedCheckpoint(Struct, frozen=True):
    """A checkpoint that a client gave a name."""

    name: str
    step: int
    model: str
    """What it is called in completions, and as the `model` of another job."""
    metadata: dict[str, Any]
    created_at: int


class RolloutSession(Protocol):
    """What a job that learns from rollouts takes from clients, and what its model has sampled."""

    @property
    def config(self) -> RolloutConfig:
        """The job's configuration, as far as the server must know it."""
        ...

    @property
    def policy(self) -> Policy:
        """What the trainer has published and handled."""
        ...

    @property
    def received(self) -> int:
        """How many groups have come."""
        ...

    def pending(self) -> list[int]:
        """The batch ids that a group may be sent for now."""
        ...

    def sampled_at(self, batch_id: int) -> int:
        """The policy version of a group that does not say: that of its credit."""
        ...

    async def known(self, batch_id: int, digest: int) -> Accepted | None:
        """What became of a group that was sent before under a batch id. None: it was not; a `send` that follows at once
        puts it in.

        Raises:
            ApiError: it was another one, or so long ago that nobody can tell; the id is none of this job's.
        """
        ...

    async def labelled(self, label: str, digest: int) -> Accepted | None:
        """What became of a group that was sent before under a name. None: it was not; a `send` that follows at once
        puts it in.

        Raises:
            ApiError: it was another one.
        """
        ...

    async def send(self, group: Group, digest: int) -> Accepted:
        """Put a group into the inbox; it is on the disk when this returns. The same group again changes nothing. The
        completions in it are spent from now on.

        Args:
            group: Its batch id is a credit, or UNNUMBERED: it takes the lowest that is offered, if one is.
            digest: 64 bits that stand for what the client sent.

        Raises:
            ApiError: the batch id was used for another group or is none of this job's; too many groups wait.
            OSError: it could not be written.
        """
        ...

    def group(self, accepted: Accepted) -> Group:
        """A group that was accepted."""
        ...

    def completion(self, id: str, index: int = 0) -> Completion | None:
        """What was sampled under an id, if it is still known."""
        ...

    def is_spent(self, id: str, index: int = 0) -> bool:
        """Whether a completion was rewarded already."""
        ...

    def match(
        self, key: bytes, without: frozenset[tuple[str, int]] = frozenset(), tools: bytes | None = None
    ) -> Completion | None:
        """The newest completion with this key (`key_of`) that is neither spent nor among `without`. `tools`: those that
        it was asked for with (`key_of_tools`); None: whichever, because older clients do not say."""
        ...


class Services(Protocol):
    """What `arbor_routes` may use: create and find jobs, send them rollouts, and reach their models.

    Wherever there is no such job, or it is another owner's, an ArborError is raised that the client gets as 404.
    """

    async def create_job(self, request: Mapping[str, Any], owner: str, warnings: Sequence[str] = ()) -> dict[str, Any]:
        """Create a fine-tuning job from the body of `POST /v1/fine_tuning/jobs`; returns the job object.

        Args:
            warnings: More events to begin the job with.
        """
        ...

    def defaults(self, method: str) -> Mapping[str, Any]:
        """The hyperparameters of a new job of this method that says nothing of them."""
        ...

    def newest(self, owner: str) -> str:
        """The id of the newest job that learns from rollouts, of those that have not ended if there are any."""
        ...

    async def job(self, job_id: str, owner: str) -> dict[str, Any]:
        """The job object."""
        ...

    async def learner(self, job_id: str, owner: str) -> dict[str, Any]:
        """The job object of a job that learns from rollouts.

        Raises:
            ArborError: 400: it learns from a file.
        """
        ...

    def events(self, job_id: str, owner: str) -> AsyncIterator[dict[str, Any]]:
        """The job's event objects, oldest first, as they come; ends when the job has ended."""
        ...

    async def changed(self, job_id: str, owner: str, seconds: float, after: int | None = None) -> int:
        """Return when the job has changed: its status, what is desired of it, its events, checkpoints or policy; or
        after so many seconds.

        Args:
            after: What the call before returned: nothing that changed since then is missed. None: from now on.

        Returns:
            The number to pass as `after` the next time, of a moment before whatever the caller looks at now.
        """
        ...

    async def ask(self, job_id: str, owner: str, desired: Desired) -> dict[str, Any]:
        """Ask a job to run, pause, cancel or finish; returns the job object as it is then.

        Raises:
            ArborError: it has ended otherwise, or is to finish and learns from a file.
        """
        ...

    def desired(self, job_id: str, owner: str) -> Desired:
        """What a job was asked to do last."""
        ...

    async def rollouts(self, job_id: str, owner: str) -> RolloutSession:
        """Where to send groups of a job that learns from rollouts, and what its model has sampled.

        Raises:
            ArborError: 400: it learns from a file, or has ended.
        """
        ...

    async def commands(self, job_id: str, owner: str) -> CommandSession:
        """Where to send commands of a job that executes them, and to get their results; also after its end.

        Raises:
            ArborError: 400: it learns from something else.
        """
        ...

    def policy(self, job_id: str, owner: str) -> Policy:
        """What the trainer has published and handled, also after its end."""
        ...

    async def checkpoint(
        self, job_id: str, owner: str, name: str, metadata: Mapping[str, Any], seconds: float
    ) -> NamedCheckpoint:
        """Have a job write a checkpoint and give it a name; waits until it is there. One that has succeeded has its
        last checkpoint named.

        Raises:
            ArborError: 400: the name cannot be one, or the job learns from a file or has ended otherwise; 504: it took
                longer than `seconds`, and the checkpoint comes later.
        """
        ...

    def checkpoints(self, job_id: str, owner: str) -> list[NamedCheckpoint]:
        """The checkpoints with names, oldest first."""
        ...

    async def warm(self, model: str, owner: str) -> None:
        """Start the engine that serves a model, if none does."""
        ...
