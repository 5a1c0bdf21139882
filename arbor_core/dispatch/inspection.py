"""Whether engines will be able to serve what a job trains, where that depends on the modules of its base model."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import msgspec

from arbor_core.data.validator import Report
from arbor_core.jobs.records import JobSpec
from arbor_core.models.inspector import Finding, Question
from arbor_core.process.output import last_words, output_of
from arbor_core.types import TrainedWeights, Trainer

log = logging.getLogger(__name__)

REMEMBERED = 1000
SECONDS = 300.0
"""How long finding out may take, with all imports."""


class Serving(Protocol):
    """What engines serve."""

    def is_open(self, model: str, trained: TrainedWeights) -> bool:
        """Whether more has to be known of what is trained of a model."""
        ...

    def refusal(self, model: str, trained: TrainedWeights, where: str) -> tuple[str, str] | None:
        """Why engines could not serve it: the path of the key that says so, and a message."""
        ...


class Inspections:
    """Asks trainers what they would train of their base models, and remembers what they said.

    Args:
        serving: What engines serve.
        turns: Processes that may check jobs at the same time.
    """

    def __init__(self, serving: Serving, turns: asyncio.Semaphore) -> None:
        self.serving, self.turns = serving, turns
        self.found: dict[tuple[str, bytes], Finding] = {}

    def needed(self, spec: JobSpec, trainer: Trainer) -> bool:
        """Whether a job's trainer has to be asked."""
        trained = trainer.trained(spec.config) if trainer.inspect else None
        return trained is not None and self.serving.is_open(spec.model, trained)

    async def report(self, spec: JobSpec, trainer: Trainer, python: str, weights: str) -> Report:
        """What is found of a job.

        Args:
            python: The interpreter that has the trainer's libraries.
            weights: Directory or hub id of those that the job begins with.
        """
        assert trainer.inspect is not None
        finding = await self._find(Question(trainer.inspect, spec.config, weights), python)
        if finding is None:
            text = "It could not be found out which modules are trained, and whether completions come from the model"
            return Report(warnings=[text])
        message = finding.error
        where = f"method.{spec.method}.hyperparameters"
        if finding.trained and (refusal := self.serving.refusal(spec.model, finding.trained, where)):
            _, message = refusal
        if message is None:
            return Report()
        return Report(error={"code": "invalid_hyperparameters", "message": message, "param": "hyperparameters"})

    async def _find(self, question: Question, python: str) -> Finding | None:
        key = (python, msgspec.json.encode(question, order="sorted"))
        if key not in self.found:
            found = await self._ask(question, python)
            if found is None:
                return None
            self.found[key] = found
            if len(self.found) > REMEMBERED:
                del self.found[next(iter(self.found))]
        return self.found[key]

    async def _ask(self, question: Question, python: str) -> Finding | None:
        """Run the inspector; None: it failed, or the trainer cannot tell."""
        try:
            async with self.turns, asyncio.timeout(SECONDS):
                code, output, errors = await output_of(python, "arbor_core.models.inspector", question)
        except TimeoutError:
            log.warning("what is trained of %s was not found out in %g s", question.model, SECONDS)
            return None
        if code != 0:
            log.warning("what is trained of %s was not found out: %s", question.model, last_words(code, errors))
            return None
        found = msgspec.json.decode(output, type=Finding)
        return found if found.trained or found.error else None
