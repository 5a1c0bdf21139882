"""What no engine could serve is said before it is trained: the job is refused, or warned."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import BASE

from arbor_core import ConfigError, Servable, TrainedWeights, Trainer, plugins
from arbor_core.application.requests import CreateFineTuningJobRequest
from arbor_core.application.servable import obstacle
from arbor_core.application.system import Arbor, open_system
from arbor_core.config.compose import serve_settings

LORA = TrainedWeights(adapter="lora", modules=("q_proj", "model.embed_tokens"), dtype="float32")
EMBEDDINGS = ("modules", "model.embed_tokens")
FULL = TrainedWeights(adapter=None)


@pytest.mark.parametrize(
    ("trained", "servable", "found"),
    [
        (LORA, Servable(), None),
        (FULL, Servable(), None),
        (FULL, Servable(full=False), ("adapter", None, "an adapter lora")),
        (LORA, Servable(adapters=()), ("adapter", "lora", "one of all weights")),
        (LORA, Servable(adapters=("dora",), full=False), ("adapter", "lora", "one of dora")),
        (LORA, Servable(modules=("q_proj", "embed_tokens")), None),
        (LORA, Servable(modules=("q_proj",)), (*EMBEDDINGS, "modules among q_proj")),
        (LORA, Servable(not_modules=("embed_tokens",)), (*EMBEDDINGS, "no modules among embed_tokens")),
        (LORA, Servable(dtypes=("bfloat16",)), ("dtype", "float32", "one of bfloat16")),
        (TrainedWeights(adapter="lora"), Servable(modules=("q_proj",), dtypes=("bfloat16",)), None),
    ],
)
def test_what_engines_could_not_load(trained: TrainedWeights, servable: Servable, found: Any) -> None:
    assert obstacle(trained, servable) == found


@pytest.mark.parametrize(("said", "adapter"), [(True, "lora"), (False, None)])
def test_a_trainer_may_say_only_whether_it_trains_an_adapter(said: bool, adapter: str | None) -> None:
    assert Trainer(Servable, "x:y", adapter=lambda _: said).trained({}) == TrainedWeights(adapter=adapter)
    assert Trainer(Servable, "x:y").trained({}) is None


@pytest.fixture
async def arbor(tmp_path: Path) -> AsyncIterator[Arbor]:
    """A server with the embedded engine and the trainers on TRL, of which nothing is started."""
    for package in ("arbor_mock", "arbor_transformers", "arbor_sft", "arbor_grpo"):
        pytest.importorskip(package)
    settings = serve_settings(f"storage={tmp_path}", "executor=mock", "allocator=mock")
    system = open_system(settings, plugins.load([]), None)
    yield system
    await system.engines.close()
    system.store.close()
    system.lock.close()


def request(method: str, hyperparameters: dict[str, Any], file: str | None = None) -> CreateFineTuningJobRequest:
    chosen = {"type": method, method: {"hyperparameters": hyperparameters}}
    return CreateFineTuningJobRequest(BASE, file, method=chosen)


LORA_OF_EMBEDDINGS = {"lora": {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "embed_tokens"]}}


async def test_a_job_whose_policy_cannot_be_served_is_refused(arbor: Arbor) -> None:
    with pytest.raises(ConfigError, match="'embed_tokens': the inference backend 'transformers' cannot") as refused:
        await arbor.job_service.create(request("grpo", LORA_OF_EMBEDDINGS), "me")
    assert refused.value.path == "method.grpo.hyperparameters.lora.target_modules"
    assert arbor.job_service.list_jobs("me", 1).data == []
    lora = {"lora": {**LORA_OF_EMBEDDINGS["lora"], "target_modules": ["q_proj"]}}
    assert (await arbor.job_service.create(request("grpo", lora), "me")).id


async def test_a_job_that_learns_from_a_file_is_warned(arbor: Arbor) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = "".join(json.dumps(row) + "\n" for _ in range(10))
    file_id, insert = await arbor.files.add_pieces("me", "rows.jsonl", [rows.encode()], "fine-tune")
    await arbor.store.write(insert)
    job = await arbor.job_service.create(request("supervised", LORA_OF_EMBEDDINGS, file_id), "me")
    found = arbor.job_service.find(job.id, "me")
    messages = [event.message for event in arbor.job_service.list_events(found, 20).data if event.level == "warn"]
    assert any("no completions come from its model" in message for message in messages), messages
