"""A model, its adapters, and an engine process that most tests share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # embedded.py, whatever the import mode

from embedded import Running, World, make_adapter, make_model, start


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = make_model(folder / "base")
    return World(
        base,
        {
            "small": make_adapter(base, folder / "small", 1, r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
            "large": make_adapter(base, folder / "large", 2, r=8, lora_alpha=16, target_modules="all-linear"),
            "stable": make_adapter(
                base,
                folder / "stable",
                3,
                r=4,
                lora_alpha=4,
                use_rslora=True,
                target_modules=["o_proj", "down_proj"],
                rank_pattern={"down_proj": 6},
                alpha_pattern={"layers.1.mlp.down_proj": 12},
            ),
        },
    )


@pytest.fixture(scope="session")
def engine(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(world.model, tmp_path_factory.mktemp("engine"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def tight(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """An engine that is short of everything: 512 cached tokens, prompts enter in chunks of 16."""
    limits = {"max_cached_tokens": 512, "max_batch": 16, "max_waiting": 64, "max_unread": 64, "prefill_tokens": 16}
    running = start(world.model, tmp_path_factory.mktemp("tight"), **limits)
    yield running
    running.stop()
