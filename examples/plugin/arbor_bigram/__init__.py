"""A trainer in forty lines: which letter follows which, counted. The server imports this file, so it stays light."""

from msgspec import Struct

from arbor_core import Trainer, hookimpl


class BigramConfig(Struct, forbid_unknown_fields=True):
    batch_size: int
    smoothing: float


@hookimpl
def arbor_trainers():
    return {"bigram": Trainer(config=BigramConfig, entry="arbor_bigram.train:train")}
