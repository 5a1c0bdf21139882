"""What no engine could serve is refused before it is trained."""

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
from arbor_core.models.inspector import Finding, Question, find

KINDS = {"linear": "q_proj", "embedding": "model.embed_tokens"}
LORA = TrainedWeights(adapter="lora", modules=("q_proj", "model.embed_tokens"), kinds=KINDS, dtype="float32")
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
        (LORA, Servable(kinds=("embedding", "linear")), None),
        (
            LORA,
            Servable(kinds=("linear",)),
            (*EMBEDDINGS, "modules of the kinds linear; this one is of the kind embedding"),
        ),
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


@pytest.mark.parametrize("method", ["grpo", "supervised"])
async def test_a_job_whose_model_cannot_be_served_is_refused(
    arbor: Arbor, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arbor_transformers import TransformersBackend

    monkeypatch.setattr(TransformersBackend, "serves", lambda *_: Servable(full=False))
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = "".join(json.dumps(row) + "\n" for _ in range(10))
    file_id, insert = await arbor.files.add_pieces("me", "rows.jsonl", [rows.encode()], "fine-tune")
    await arbor.store.write(insert)
    file = file_id if method == "supervised" else None
    with pytest.raises(ConfigError, match="null: the inference backend 'transformers' cannot serve it") as refused:
        await arbor.job_service.create(request(method, {"lora": None}, file), "me")
    assert refused.value.path == f"method.{method}.hyperparameters.lora"
    assert arbor.job_service.list_jobs("me", 1).data == []
    assert (await arbor.job_service.create(request(method, {}, file), "me")).id


EMBEDDING = [["embed_tokens"], ["q_proj", "embed_tokens"], ".*(q_proj|embed_tokens)"]
"""Ways to name it, by themselves and among others."""


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A model of which nothing is there but its architecture."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    transformers.LlamaConfig(vocab_size=64, **sizes).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def inspected(arbor: Arbor, trainer: str, model: str, modules: Any) -> tuple[Finding, bool]:
    """What is found of a LoRA of some modules, and whether the model has to be looked at for it."""
    found, lora = arbor.trainers[trainer], {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": modules}
    config = {**found.values, "lora": lora}
    static = found.trainer.trained(config)
    assert static and found.trainer.inspect
    open_question = arbor.job_service.submission.serving.is_open(BASE, static)
    return find(Question(found.trainer.inspect, config, model)), open_question


@pytest.mark.ml
@pytest.mark.parametrize("trainer", ["sft", "grpo"])
@pytest.mark.parametrize("modules", EMBEDDING)
def test_lora_on_the_embedding(arbor: Arbor, llama: str, trainer: str, modules: Any) -> None:
    found, is_open = inspected(arbor, trainer, llama, modules)
    assert is_open and found.trained
    assert found.trained.kinds["embedding"] == "model.embed_tokens"
    refusal = arbor.job_service.submission.serving.refusal(BASE, found.trained, "method.x.hyperparameters")
    assert refusal and refusal[0] == "method.x.hyperparameters.lora.target_modules"
    assert "'model.embed_tokens': the inference backend 'transformers' cannot serve it" in refusal[1]


@pytest.mark.ml
@pytest.mark.parametrize("trainer", ["sft", "grpo"])
@pytest.mark.parametrize(("modules", "open_question"), [(["q_proj", "up_proj"], True), ("all-linear", False)])
def test_lora_of_linear_layers(arbor: Arbor, llama: str, trainer: str, modules: Any, open_question: bool) -> None:
    found, is_open = inspected(arbor, trainer, llama, modules)
    assert is_open == open_question
    assert found.trained and list(found.trained.kinds) == ["linear"] and len(found.trained.modules) >= 4
    assert arbor.job_service.submission.serving.refusal(BASE, found.trained, "") is None


@pytest.mark.ml
@pytest.mark.parametrize("modules", [".*", ["no_such_module"], "model"])
def test_lora_of_what_peft_does_not_change(arbor: Arbor, llama: str, modules: Any) -> None:
    found, _ = inspected(arbor, "sft", llama, modules)
    assert found.trained is None and found.error and found.error.startswith("lora: ")


async def test_modules_that_are_trained_whole_are_no_option(arbor: Arbor) -> None:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}
    with pytest.raises(ConfigError, match="modules_to_save"):
        await arbor.job_service.create(request("grpo", {"lora": lora}), "me")
