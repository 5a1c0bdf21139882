"""Whether engines will be able to serve what a job trains: said before it trains."""

from __future__ import annotations

from typing import Any

from arbor_core.inference.backends import Backends
from arbor_core.models.fine_tuned import first_base
from arbor_core.types import Servable, TrainedWeights


class ServableCheck:
    """What the backends of a server say of what jobs train."""

    def __init__(self, backends: Backends) -> None:
        self.backends = backends

    def is_open(self, model: str, trained: TrainedWeights) -> bool:
        """Whether more has to be known of what is trained.

        Args:
            model: Name of the model that training begins with.
        """
        servable = self.backends.serves(model)
        return servable is not None and unknown(trained, servable)

    def refusal(self, model: str, trained: TrainedWeights, where: str) -> tuple[str, str] | None:
        """Why a job is refused: the path of the key that says so, and a message; None: engines can serve it.

        Args:
            where: The path of the job's configuration.
        """
        servable = self.backends.serves(model)
        found = obstacle(trained, servable) if servable else None
        if found is None:
            return None
        field, value, wanted = found
        path = f"{where}.{trained.keys[field]}" if field in trained.keys else where
        shown = "null" if value is None else f"'{value}'"
        backend = self.backends.of(first_base(model)).name
        why = f"the inference backend '{backend}' cannot serve it, which takes {wanted}"
        return path, f"Invalid '{path}': {shown}: {why}."


def unknown(trained: TrainedWeights, servable: Servable) -> bool:
    """Whether it depends on the modules, and is not known which are trained."""
    kinds = servable.kinds is not None and not trained.kinds
    names = servable.modules is not None and not trained.modules
    return trained.adapter is not None and (kinds or names)


def obstacle(trained: TrainedWeights, servable: Servable) -> tuple[str, Any, str] | None:
    """What engines could not load of trained weights; None: nothing is known of that kind.

    Returns:
        Which of the fields of `TrainedWeights` says it, its value, and what engines expect.
    """
    if trained.adapter is None and not servable.full:
        return "adapter", None, expected("an adapter", servable.adapters)
    if trained.adapter is not None and trained.adapter not in servable.adapters:
        whole = ("all weights",) if servable.full else ()
        return "adapter", trained.adapter, expected("one of", (*servable.adapters, *whole))
    if trained.adapter and (found := module_obstacle(trained, servable)):
        return "modules", *found
    if trained.dtype is not None and servable.dtypes is not None and trained.dtype not in servable.dtypes:
        return "dtype", trained.dtype, expected("one of", servable.dtypes)
    return None


def module_obstacle(trained: TrainedWeights, servable: Servable) -> tuple[str, str] | None:
    """A module that an adapter changes and engines do not, and what they expect."""
    for module in trained.modules:
        if servable.modules is not None and module.rpartition(".")[2] not in servable.modules:
            return module, expected("modules among", servable.modules)
    for kind, module in trained.kinds.items():
        if servable.kinds is not None and kind not in servable.kinds:
            return module, f"{expected('modules of the kinds', servable.kinds)}; this one is of the kind {kind}"
    return None


def expected(what: str, names: tuple[str, ...]) -> str:
    return f"{what} {', '.join(names)}" if names else what
