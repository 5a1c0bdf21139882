"""Which inference backend serves which model, with which options, and what its engines need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from arbor_core.models.fine_tuned import first_base
from arbor_core.types import ArborError, Device, EngineNeeds, InferenceBackend, Servable

T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """An inference backend with its options."""

    name: str
    backend: InferenceBackend
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Backends:
    """The backends of one server.

    Args:
        default: Serves the models that no pattern matches.
        others: By name.
        models: Names of backends by patterns of names of base models; the first that matches counts.
        replicas: How many engines may serve a model, by patterns in the same way; otherwise its backend says.
    """

    default: Backend
    others: Mapping[str, Backend]
    models: Mapping[str, str]
    replicas: Mapping[str, int]

    def of(self, model: str) -> Backend:
        """The backend of a base model, by its public name."""
        name = first_match(self.models, model)
        return self.default if name in (None, self.default.name) else self.others[name]

    def sender(self, model: str) -> str:
        """What makes the sender of the engines of a model (`AttemptOrder.sender`); empty: they take files."""
        return str(getattr(self.of(first_base(model)).backend, "sender", ""))

    def serves(self, model: str) -> Servable | None:
        """What engines of a model can load and serve; None: their backend does not say."""
        chosen = self.of(first_base(model))
        said = getattr(chosen.backend, "serves", None)
        return said(chosen.options) if said else None

    def needs(self, model: str, path: str, devices: Sequence[Device]) -> EngineNeeds:
        """What engines of a model need.

        Args:
            model: Public name of the base model.
            path: Directory (or hub id) of the weights.
            devices: Those that engines may get.

        Raises:
            ArborError: the backend asks for what cannot be.
        """
        chosen = self.of(model)
        said = chosen.backend.needs(path, chosen.options, devices)
        if min(said.devices, said.adapters, said.replicas) < 1 or not 0 < said.share <= 1:
            raise ArborError(f"the inference backend '{chosen.name}' needs what cannot be for '{model}': {said}")
        replicas = first_match(self.replicas, model) or said.replicas
        return EngineNeeds(said.devices, said.share, said.adapters, replicas)


def first_match(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches a name."""
    return next((value for pattern, value in patterns.items() if fnmatchcase(name, pattern)), None)
