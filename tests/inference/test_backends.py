"""Which backend serves which model, and what its engines need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from arbor_core import ArborError, EngineNeeds, plugins
from arbor_core.application.choice import open_backends
from arbor_core.config.compose import serve_settings
from arbor_core.inference.backends import Backend, Backends
from arbor_core.models.fine_tuned import Resolved, first_base


class Saying:
    """A backend that needs what it is told to."""

    def __init__(self, needs: EngineNeeds) -> None:
        self.said = needs

    def needs(self, *_: Any) -> EngineNeeds:
        return self.said


def backends(models: Mapping[str, str], wanted: Mapping[str, int] = {}, **said: Any) -> Backends:
    def one(name: str) -> Backend:
        backend: Any = Saying(EngineNeeds(**said))
        return Backend(name, backend, {})

    return Backends(one("default"), {name: one(name) for name in models.values()}, models, wanted)


def test_the_first_pattern_that_matches_counts() -> None:
    of = backends({"Qwen/Qwen3-0.6B": "small", "Qwen/*": "large", "*": "rest"}).of
    assert [of(name).name for name in ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "tiny", "qwen/x")] == [
        "small", "large", "rest", "rest",
    ]  # fmt: skip
    assert backends({"Qwen/*": "large"}).of("tiny").name == "default"


@pytest.mark.parametrize(
    ("resolved", "family"),
    [
        (Resolved("tiny", "tiny", "/m/tiny"), "tiny"),
        (Resolved("ft:tiny:arbor::x", "tiny", "/m/tiny"), "tiny"),
        (Resolved("ft:org/n:arbor::x", "ft:org/n:arbor::x", "/f", began="org/n"), "org/n"),
        (Resolved("ftjob-1", "ftjob-1", "/f", began="ft:org/n:arbor::x"), "org/n"),
    ],
)
def test_a_model_that_was_trained_is_served_as_its_base_model(resolved: Resolved, family: str) -> None:
    assert resolved.family == family
    assert first_base("ft:ft") == "ft"


def test_the_operator_says_how_many_engines_before_the_backend_does() -> None:
    chosen = backends({}, {"Qwen/*": 3}, replicas=2, devices=4, share=0.5)
    assert chosen.needs("Qwen/x", "/x", ()) == EngineNeeds(4, 0.5, 64, 3)
    assert chosen.needs("tiny", "/x", ()).replicas == 2


@pytest.mark.parametrize("said", [{"devices": 0}, {"share": 0.0}, {"share": 1.1}, {"adapters": 0}, {"replicas": 0}])
def test_what_cannot_be_is_said_with_the_name_of_the_backend(said: dict[str, Any]) -> None:
    with pytest.raises(ArborError, match="'default' needs what cannot be for 'tiny'"):
        backends({}, **said).needs("tiny", "/x", ())


def test_the_settings_of_a_server_choose_backends_and_their_options() -> None:
    pytest.importorskip("arbor_mock")
    pytest.importorskip("arbor_transformers")
    settings = serve_settings(
        "inference.models={sim/*:mock}", "engine.max_batch=7", "engines.mock.devices=2", "engines.mock.share=0.4"
    )
    found = open_backends(settings, plugins.load())
    assert (found.of("tiny").name, found.of("tiny").options["max_batch"]) == ("transformers", 7)
    assert found.of("sim/x").name == "mock"
    assert found.needs("sim/x", "x", ()) == EngineNeeds(2, 0.4, 64, 1)
