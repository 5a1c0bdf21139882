"""A trainer in forty lines: which letter follows which, counted; and one that learns the same from rewards.

The server imports this file, so it stays light.
"""

from msgspec import Struct

from arbor_core import RolloutConfig, Trainer, hookimpl


class ReinforceConfig(RolloutConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    learning_rate: float


class BigramConfig(Struct, forbid_unknown_fields=True):
    batch_size: int
    smoothing: float


@hookimpl
def arbor_trainers():
    return {
        "bigram": Trainer(config=BigramConfig, entry="arbor_bigram.train:train"),
        "reinforce": Trainer(config=ReinforceConfig, entry="arbor_bigram.reinforce:train", input="rollouts"),
    }
