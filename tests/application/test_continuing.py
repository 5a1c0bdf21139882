"""What a request may say of an adapter that it trains further."""

from __future__ import annotations

from typing import Any

import pytest

from arbor_core import ConfigError
from arbor_core.application.continuing import continuing

SETTLED = {"lora": {"r": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": ["k_proj", "q_proj"]}}


@pytest.mark.parametrize(
    ("given", "lora"),
    [
        ({"n_epochs": 2}, {}),
        ({"lora": {}}, {}),
        ({"lora": {"r": 8, "alpha": 16}}, {}),
        ({"lora": {"target_modules": ["q_proj", "k_proj"]}}, {"target_modules": ["q_proj", "k_proj"]}),
    ],
)
def test_what_the_adapter_has_stands_in_place_of_the_defaults(given: dict[str, Any], lora: dict[str, Any]) -> None:
    found = continuing(given, SETTLED, "hyperparameters", "ft:x")
    assert found == {**given, "lora": {**SETTLED["lora"], **lora}}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"lora": None}, "hyperparameters.lora"),
        ({"lora": {"r": 16}}, "hyperparameters.lora.r"),
        ({"lora": {"target_modules": ["q_proj"]}}, "hyperparameters.lora.target_modules"),
        ({"lora": {"target_modules": "all-linear"}}, "hyperparameters.lora.target_modules"),
    ],
)
def test_what_contradicts_it_is_refused_by_name(given: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match="'ft:x', which the job trains further, has") as refused:
        continuing(given, SETTLED, "hyperparameters", "ft:x")
    assert refused.value.path == path
