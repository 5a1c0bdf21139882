"""How policies get from a trainer into engines: as files, or as a backend's sender does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class PolicyWeights(Protocol):
    """The trained weights as they are now, in one rank of a trainer."""

    @property
    def module(self) -> Any:
        """The model that holds them: this rank's part, where they are spread over several. None: there is none."""
        ...

    def write(self, folder: Path | None) -> None:
        """Write them as files, as a PEFT adapter or as a model. Every rank calls it at the same time, because they may
        be spread over all: rank 0 with a folder, the others with None."""
        ...


class Sender(Protocol):
    """Brings policies into engines without files. A backend names the function or class that makes one of a `Run`."""

    def send(self, version: int, weights: PolicyWeights) -> Mapping[str, Any]:
        """Send a version, or get it ready to be fetched. Called in every rank of the trainer at the same time.

        What rank 0 returns (values of JSON) is stored with the version, and each engine that is to have it is given it
        as `sent`, maybe much later: one that starts anew, for example. A version that engines cannot have any more is
        passed over for a newer one; while the trainer is paused, its checkpoint serves.

        Raises:
            Exception: the attempt ends, and the next one goes on from the last checkpoint.
        """
        ...
