"""What the routes of plugins may use of the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from .jobs import Desired

if TYPE_CHECKING:
    from arbor_core.live import Live
    from arbor_core.rollouts import Policy


class NamedCheckpoint(Struct, frozen=True):
    """A checkpoint that a client gave a name."""

    name: str
    step: int
    model: str
    """What it is called in completions, and as the `model` of another job."""
    metadata: dict[str, Any]
    created_at: int


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

    async def changed(self, job_id: str, owner: str, seconds: float) -> None:
        """Return when the job has another status, or its trainer has reported something; or after so many seconds."""
        ...

    async def ask(self, job_id: str, owner: str, desired: Desired) -> dict[str, Any]:
        """Ask a job to run, pause, cancel or finish; returns the job object as it is then.

        Raises:
            ArborError: it has ended otherwise, or is to finish and learns from a file.
        """
        ...

    def asked(self, job_id: str, owner: str) -> Desired:
        """What was asked of a job last."""
        ...

    def rollouts(self, job_id: str, owner: str) -> Live:
        """Where to send groups of a job that learns from rollouts, and what its model has sampled.

        Raises:
            ArborError: 400: it learns from a file, or has ended.
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
