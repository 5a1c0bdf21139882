"""A trainer in forty lines: which letter follows which, counted; one that learns the same from rewards, and one that
counts what it is told to.

The server imports this file, so it stays light.
"""

from msgspec import Struct

from arbor_core import RolloutConfig, Trainer, hookimpl


class ReinforceConfig(RolloutConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    learning_rate: float


class InteractiveConfig(Struct, forbid_unknown_fields=True):
    smoothing: float


class BigramConfig(Struct, forbid_unknown_fields=True):
    batch_size: int
    smoothing: float


@hookimpl
def arbor_trainers():
    return {
        "bigram": Trainer(config=BigramConfig, entry="arbor_bigram.train:train"),
        "reinforce": Trainer(config=ReinforceConfig, entry="arbor_bigram.reinforce:train", input="rollouts"),
        "interactive": Trainer(config=InteractiveConfig, entry="arbor_bigram.interactive:train", input="commands"),
    }


@hookimpl
def arbor_routes(services):
    from .routes import routes

    return routes(services)
