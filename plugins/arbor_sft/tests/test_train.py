"""Whole jobs: `python -m arbor_core.worker.main` on a job directory, with the tiny model."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from arbor_sft import LoraSettings, SftConfig
from arbor_sft.batches import tells_rows_apart
from arbor_trl import trained_weights
from arbor_trl.chat import Sample
from arbor_trl.job import prove
from peft import PeftModel
from sft_jobs import DEFAULTS, FULL, Job, chat, config, until, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from arbor_core import (
    CheckpointEvent,
    ConfigError,
    ErrorEvent,
    HyperparametersResolved,
    MessageEvent,
    MetricsEvent,
    PausedEvent,
    ResultEvent,
)
from arbor_core.config.convert import merged
from arbor_core.testing import device
from arbor_core.testing.reports import check_stored

LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "learning_rate": 1e-2, "batch_size": 4, "n_epochs": 1}


def words(count: int, longest: int = 6, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = ["".join(draw.choices("abcd", k=draw.randint(2, longest))) for _ in range(count)]
    return [chat(word, word[::-1]) for word in found]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 rows for training, of widely varying length, and 12 for validation."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", [*words(24), *words(8, longest=200, seed=2)])
    write_rows(folder / "valid.jsonl", words(12, seed=1))
    return folder


@pytest.fixture
def job(tmp_path: Path, tiny: Path, data: Path) -> Any:
    def make(name: str = "job", valid: bool = False, seed: int = 1, **hyperparameters: Any) -> Job:
        validation = data / "valid.jsonl" if valid else None
        return Job(tmp_path / name, tiny, data / "train.jsonl", validation, hyperparameters, seed)

    return make


# --- configuration ---------------------------------------------------------------------------------------------------


def test_defaults_have_the_structs_keys() -> None:
    assert set(DEFAULTS) == {field.name for field in msgspec.structs.fields(SftConfig)}
    assert set(DEFAULTS["lora"]) == {field.name for field in msgspec.structs.fields(LoraSettings)}
    assert config({}).n_epochs == "auto"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({"lora": {"rank": 8}}, "Unknown parameter: 'hyperparameters.lora.rank'"),
        ({"n_epochs": 51}, "hyperparameters.n_epochs"),
        ({"batch_size": 0}, "hyperparameters.batch_size"),
        ({"learning_rate_multiplier": 0}, "hyperparameters.learning_rate_multiplier"),
        ({"batching": "clever"}, "hyperparameters.batching"),
    ],
)
def test_a_wrong_value_is_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        config(given)


# --- what a job reports and leaves -----------------------------------------------------------------------------------


def test_full_weights(job: Any) -> None:
    made = job(valid=True, **{**FULL, "n_epochs": 3, "eval_steps": 5}).run(cold=True)
    loss = made.curve()
    assert len(loss) == 24
    assert loss[-1] < 0.6 * loss[0]
    assert made.event(HyperparametersResolved).hyperparameters == {
        "n_epochs": 3,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
    }
    metrics = [event.data for event in made.events(MetricsEvent)]
    assert [m["step"] for m in metrics if "valid_loss" in m] == [5, 8, 10, 15, 16, 20, 24]
    assert [m["step"] for m in metrics if "full_valid_loss" in m] == [8, 16, 24]
    assert all(0 <= m["train_mean_token_accuracy"] <= 1 for m in metrics)
    assert [event.step for event in made.events(CheckpointEvent) if not event.name] == [8, 16, 24]
    assert made.events(CheckpointEvent)[-1].data["metrics"]["full_valid_loss"] == metrics[-1]["valid_loss"]
    result = made.event(ResultEvent)
    assert (result.step, result.adapter) == (24, False)
    assert result.trained_tokens == 3 * tokens(made.model, made.training_file)
    loss_again, accuracy_again = reference(made.result(), made.validation_file)
    assert metrics[-1]["valid_loss"] == pytest.approx(loss_again, abs=1e-5)
    assert metrics[-1]["valid_mean_token_accuracy"] == pytest.approx(accuracy_again, abs=1e-6)


def test_adapter(job: Any) -> None:
    made = job(valid=True, **LORA).run()
    assert made.event(ResultEvent).adapter is True
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        path.name for path in made.result().iterdir()
    }
    loss, _ = reference(made.result(), made.validation_file, base=made.model)
    assert made.curve("valid_loss")[-1] == pytest.approx(loss, abs=1e-5)
    assert made.curve("valid_loss")[-1] < reference(made.model, made.validation_file)[0]


def tokens(model: Path, path: Path) -> int:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    return sum(len(tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]) for row in rows)


def reference(checkpoint: Path, path: Path | None, base: Path | None = None) -> tuple[float, float]:
    """Loss and accuracy per assistant token, row by row, without anything of ours or TRL's."""
    model = AutoModelForCausalLM.from_pretrained(base or checkpoint)
    if base:
        model = PeftModel.from_pretrained(model, checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert path is not None
    loss = correct = count = 0.0
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt + messages[1]["content"] + "<|im_end|>", return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model.eval()(ids).logits[0, start - 1 : -1]
        loss += torch.nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum").item()
        correct += (logits.argmax(-1) == ids[0, start:]).sum().item()
        count += len(ids[0]) - start
    return loss / count, correct / count


# --- the same gradient whatever the micro-batches --------------------------------------------------------------------


def test_layouts_agree(job: Any) -> None:
    one: dict[str, Any] = {**FULL, "batch_size": 8, "max_steps": 4, "lr_scheduler_type": "constant", "warmup_ratio": 0}
    plain = job("plain", **one, batching="padded").run()
    for name, changes in {
        "sorted": {"batching": "sorted", "micro_batch_size": 3},
        "single": {"batching": "padded", "micro_batch_size": 1},
        "packed": {"batching": "packed", "micro_batch_size": 4},
        "checkpointing": {"batching": "sorted", "gradient_checkpointing": True},
    }.items():
        other = job(name, **one, **changes).run()
        for key in ("train_loss", "train_mean_token_accuracy", "grad_norm"):
            assert other.curve(key) == pytest.approx(plain.curve(key), rel=2e-3), (name, key)


def test_packing_is_for_models_that_tell_rows_apart(tiny: Path) -> None:
    samples = [Sample(list(range(start, start + 9)), list(range(9))) for start in (40, 60)]
    mamba = MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4)
    assert tells_rows_apart(AutoModelForCausalLM.from_pretrained(tiny), samples)
    assert not tells_rows_apart(MambaForCausalLM(mamba), samples)


@pytest.mark.skipif(device().kind == "cuda", reason="one GPU, and NCCL wants one for each rank")
def test_two_ranks(job: Any) -> None:
    settings = {**FULL, "batch_size": 8, "checkpoint_steps": 3}
    one, two = job("one", valid=True, **settings).run(), job("two", valid=True, **settings)
    assert two.start(ranks=2).wait() == 0, two.log()
    for name in ("train_loss", "train_mean_token_accuracy", "grad_norm", "valid_loss"):
        assert two.curve(name) == pytest.approx(one.curve(name), rel=1e-4)
    assert [event.step for event in two.events(CheckpointEvent) if not event.name] == [3, 4]
    shutil.rmtree(two.result())
    assert two.start(ranks=2).wait() == 0, two.log()
    assert two.curve() == two.curve(attempt=1)[3:]


# --- the same weights whatever happens -------------------------------------------------------------------------------


def test_same_seed_same_weights(job: Any) -> None:
    first, again, other = (job(name, **FULL, seed=seed).run() for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert first.curve() == again.curve()
    assert first.digest() == again.digest() != other.digest()


@pytest.mark.parametrize("batching", ["sorted", "packed"])
@pytest.mark.parametrize("kind", [pytest.param(FULL, id="full"), pytest.param(LORA, id="lora-with-dropout")])
def test_pause_and_kill_change_nothing(job: Any, kind: dict[str, Any], batching: str) -> None:
    settings = {**kind, "n_epochs": 5, "checkpoint_steps": 7, "micro_batch_size": 2, "batching": batching}
    whole = job("whole", **settings).run()
    broken = job("broken", **settings)
    draw = random.Random(f"{kind['lora']}/{batching}")  # where it is interrupted: differs by case, not by run

    process = broken.start()
    until(process, broken, MetricsEvent, draw.randint(1, 6))
    (broken.dir / "desired").write_text("pause")
    assert process.wait() == 0, broken.log()
    assert broken.events()[-1].type == "paused"
    assert broken.events(CheckpointEvent)[-1].step == broken.events(MetricsEvent)[-1].step

    (broken.dir / "desired").write_text("run")
    process = broken.start()
    until(process, broken, CheckpointEvent, 2)
    until(process, broken, MetricsEvent, len(broken.events(MetricsEvent)) + draw.randint(0, 4))
    process.kill()
    assert not broken.events(ResultEvent)
    resumed = broken.events(MetricsEvent)[0].step
    assert resumed == broken.events(CheckpointEvent, attempt=1)[-1].step + 1

    broken.run()
    assert broken.events(MetricsEvent)[0].step > resumed
    expected = whole.digests()
    assert list(expected) == list(range(1, 41))
    assert len(set(expected.values())) == 40  # each step changes the parameters
    for attempt in (1, 2, 3):
        found = broken.digests(attempt)
        assert found == {step: expected[step] for step in found}
    assert max(found) == 40
    assert broken.curve() == whole.curve()[-len(broken.curve()) :]
    assert broken.digest() == whole.digest()
    assert broken.event(ResultEvent).trained_tokens == whole.event(ResultEvent).trained_tokens


HUNGRY = """
import os
from pathlib import Path

from arbor_sft import train as module


class Hungry(module.RunTrainer):
    def training_step(self, model, inputs, *rest):
        with Path(os.environ["SIZES"]).open("a") as file:
            print(inputs["input_ids"].numel(), file=file)
        if self.state.global_step == 5 and "FAILS" in os.environ:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: Tried to allocate 9 bytes")
        return super().training_step(model, inputs, *rest)


def train(run):
    module.RunTrainer = Hungry
    module.train(run)
"""
"""A trainer that notes the tokens of its micro-batches, and has no memory in its sixth step if it is told so."""


def test_row_88_smaller_micro_batches_after_the_memory_did_not_do(
    tmp_path: Path, tiny: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    settings = {**FULL, "batch_size": 8, "n_epochs": 3, "max_steps": 10, "checkpoint_steps": 4}

    def attempt(made: Job, sizes: str) -> tuple[int, int]:
        monkeypatch.setenv("SIZES", str(tmp_path / sizes))
        code = made.attempt(cold=True)
        return code, max(map(int, (tmp_path / sizes).read_text().split()))

    whole, broken = (
        Job(tmp_path / name, tiny, data / "train.jsonl", None, settings, entry="hungry:train")
        for name in ("whole", "broken")
    )
    code, largest = attempt(whole, "whole-sizes")
    assert code == 0, whole.log()
    with monkeypatch.context() as fails:
        fails.setenv("FAILS", "1")
        assert attempt(broken, "first-sizes")[0] == 1
    assert broken.event(ErrorEvent).code == "out_of_memory"
    broken.share = 0.5
    code, smaller = attempt(broken, "second-sizes")
    assert code == 0, broken.log()
    assert smaller <= largest / 2
    assert [event.data["step"] for event in broken.events(MetricsEvent)] == list(range(5, 11))
    assert broken.curve() == pytest.approx(whole.curve()[4:], rel=1e-4)
    assert broken.curve("grad_norm") == pytest.approx(whole.curve("grad_norm")[4:], rel=1e-3)


def test_a_job_on_another_processor_says_so(job: Any) -> None:
    made = job(**FULL, max_steps=1)
    path = made.dir / "job.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cpu": "abacus"}))
    made.run()
    assert [event.data["made"] for event in made.events(MessageEvent) if event.level == "warn"] == ["abacus"]


def test_a_finished_job_that_lost_its_last_word(job: Any) -> None:
    made = job(**FULL).run()
    digest = made.digest()
    made.run()
    assert made.events(MetricsEvent) == []
    assert made.digest() == digest


def test_cancel(job: Any) -> None:
    made = job(**{**FULL, "n_epochs": 50})
    process = made.start()
    until(process, made, MetricsEvent, 2)
    (made.dir / "desired").write_text("cancel")
    assert process.wait() == 0
    assert made.events(ResultEvent) == made.events(PausedEvent) == made.events(ErrorEvent) == []


def test_keep_checkpoints(job: Any) -> None:
    made = job(**{**FULL, "checkpoint_steps": 2, "keep_checkpoints": 2}).run()
    assert {path.name for path in (made.dir / "checkpoints").iterdir()} == {"6-1", "8-1"}


# --- what goes wrong -------------------------------------------------------------------------------------------------


def failure(made: Job) -> ErrorEvent:
    assert made.attempt() == 1, made.log()
    return made.event(ErrorEvent)


def test_row_63_too_long(job: Any) -> None:
    cut = job("cut", **FULL, max_length=60).run()
    (warning,) = [event for event in cut.events(MessageEvent) if event.level == "warn"]
    long = warning.data["truncated"] + warning.data["skipped"]
    assert long > 0
    skip = job("skip", **FULL, max_length=60, too_long="skip").run()
    (warning,) = [event for event in skip.events(MessageEvent) if event.level == "warn"]
    assert warning.data == {"truncated": 0, "skipped": long}
    assert skip.event(ResultEvent).trained_tokens < cut.event(ResultEvent).trained_tokens
    error = failure(job("short", **FULL, max_length=12))
    assert error.code == "invalid_training_file"
    assert "longer than 12 tokens" in error.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("nonsense", "line 2: not JSON", id="row-2"),
        pytest.param('{"prompt": "a"}', "line 2: Missing required parameter: 'messages'", id="row-61"),
        pytest.param('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no assistant message", id="row-62"),
    ],
)
def test_bad_rows(job: Any, tmp_path: Path, text: str, message: str) -> None:
    made = job(**FULL)
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(chat("a", "b")) + "\n" + text + "\n")
    broken = Job(tmp_path / "bad", made.model, path, None, FULL)
    error = failure(broken)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert message in error.message
    assert text[:20] in error.message


@pytest.mark.parametrize("name", ["empty", "nobody/has-this-one"], ids=["row-107-nothing-in-it", "row-107-offline"])
def test_bad_model(tmp_path: Path, data: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    model = tmp_path / "empty" if name == "empty" else Path(name)
    error = failure(Job(tmp_path / "job", model, data / "train.jsonl", None, FULL))
    assert (error.code, error.param) == ("model_unavailable", "model")
    assert "\n" not in error.message


def test_bad_modules(job: Any) -> None:
    error = failure(job(**{**LORA, "lora": {"target_modules": ["no_such"]}}))
    assert error.param == "hyperparameters"
    assert "no_such" in error.message


def test_divergence(job: Any) -> None:
    error = failure(job(**{**FULL, "learning_rate": 1e30, "max_grad_norm": 0, "n_epochs": 20}))
    assert error.code == "training_diverged"


def test_remaining_settings_reach_the_trainer(job: Any) -> None:
    """Each changes the weights, so none is ignored."""
    base = {**FULL, "max_steps": 6}
    seen = {job("base", **base).run().digest()}
    for number, changes in enumerate(
        [
            {"learning_rate_multiplier": 0.5},
            {"lr_scheduler_type": "cosine"},
            {"warmup_ratio": 0.5},
            {"weight_decay": 0.5},
            {"max_grad_norm": 0.1},
            {"dtype": "bfloat16"},
            {"attention": "eager"},
        ]
    ):
        seen.add(job(str(number), **{**base, **changes}).run().digest())
    assert len(seen) == 8


@pytest.mark.parametrize("values", [LORA, FULL], ids=["lora", "full"])
def test_weights_are_stored_as_the_server_is_told(job: Any, values: dict[str, Any]) -> None:
    """Also where they are computed in another number format."""
    done = job(**{**values, "dtype": "bfloat16", "max_steps": 1}).run()
    check_stored(done.result(), trained_weights(merged(DEFAULTS, values)))


def test_warm_proof() -> None:
    prove()
