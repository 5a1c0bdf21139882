"""A trainer in forty lines: which letter follows which, counted; one that learns the same from rewards, and one that
counts what it is told to; and an engine that answers with what it was told.

The server imports this file, so it stays light.
"""

import sys

from msgspec import Struct

from arbor_core import RolloutConfig, Trainer, hookimpl
from arbor_core.engine import EngineNeeds, EngineProcess, Servable


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


class EchoOptions(Struct, forbid_unknown_fields=True):
    prefix: str


class EchoBackend:
    options = EchoOptions

    def needs(self, path, options, devices):
        return EngineNeeds(devices=1, share=0.1, adapters=8, replicas=2)

    def serves(self, options):
        return Servable(adapters=("lora",), full=False)

    async def find(self, path):
        """Every name is a model; another backend raises UnknownModelError where there is none."""

    async def start(self, spec):
        return await EngineProcess.start([sys.executable, "-m", "arbor_bigram.engine"], {}, spec)


@hookimpl
def arbor_inference_backends():
    return {"echo": EchoBackend}
