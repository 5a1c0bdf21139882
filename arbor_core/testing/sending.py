"""A sender whose versions end with their attempt, as those of most do; and that trainers reckon with it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arbor_core.types import PolicyPublished, PolicyWeights, Run

from .job_directory import JobDirectory

FORGETFUL = f"{__name__}:ForgetfulSender"


class ForgetfulSender:
    """Has the weights written and keeps nothing of them."""

    def __init__(self, run: Run[Any]) -> None:
        self.run = run

    def send(self, version: int, weights: PolicyWeights) -> Mapping[str, Any]:
        """See `arbor_core.Sender.send`."""
        with tempfile.TemporaryDirectory(dir=self.run.work) as folder:
            weights.write(Path(folder) if self.run.rank == 0 else None)
            if self.run.rank == 0 and not any(Path(folder).iterdir()):
                raise AssertionError(f"policy version {version} was written without a file")
        return {"version": version}


def check_sent_again(job: JobDirectory) -> None:
    """An attempt sends the newest version of the one before it again: it may have gone with it."""
    before = [
        event.version for event in job.events(PolicyPublished, attempt=job.attempts - 1) if event.sent is not None
    ]
    again = [event.version for event in job.events(PolicyPublished)]
    assert not before or max(before) in again, (
        f"an attempt sent the policies {before} and ended; the next one sent {again}, and not the newest of those "
        "before: call run.send_policy when the last checkpoint is loaded"
    )
