"""Whether engines will be able to serve what a job trains: said before it trains."""

from __future__ import annotations

from typing import Any

from arbor_core.types import Servable, TrainedWeights


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
    for module in trained.modules if trained.adapter else ():
        name = module.rpartition(".")[2]
        if servable.modules is not None and name not in servable.modules:
            return "modules", module, expected("modules among", servable.modules)
        if name in servable.not_modules:
            return "modules", module, expected("no modules among", servable.not_modules)
    if trained.dtype is not None and servable.dtypes is not None and trained.dtype not in servable.dtypes:
        return "dtype", trained.dtype, expected("one of", servable.dtypes)
    return None


def expected(what: str, names: tuple[str, ...]) -> str:
    return f"{what} {', '.join(names)}" if names else what
