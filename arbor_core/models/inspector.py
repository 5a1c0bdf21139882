"""Finds out what a job would train of its base model: `python -m arbor_core.models.inspector <Question as JSON>`.

A process of its own, because it takes the trainer's libraries. Says what it found as one JSON object on standard
output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from arbor_core.jobdir.documents import import_object
from arbor_core.process.prctl import die_with_parent
from arbor_core.types import JobFailed, TrainedWeights


class Question(msgspec.Struct, frozen=True):
    """What is to be found out, and how."""

    inspect: str
    """`"package.module:function"`, of the trainer."""
    config: dict[str, Any]
    model: str
    """Directory or hub id."""


class Finding(msgspec.Struct):
    """What was found."""

    trained: TrainedWeights | None = None
    """None: it cannot be known."""
    error: str | None = None
    """Why the trainer refuses the configuration."""


def find(question: Question) -> Finding:
    """Ask the trainer."""
    inspect: Callable[[dict[str, Any], str], TrainedWeights | None] = import_object(question.inspect)
    try:
        return Finding(inspect(question.config, question.model))
    except JobFailed as error:
        return Finding(error=str(error))


def main(question: Question) -> None:
    said = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print
    die_with_parent(said)  # without the server nobody reads it
    os.write(said, msgspec.json.encode(find(question)))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Question))
