"""The main job with real parts: the tiny model, TRL, the embedded engine, the stock client."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from live import LiveServer, launch
from waiting import until

AutoTokenizer = pytest.importorskip("transformers").AutoTokenizer

pytestmark = [pytest.mark.ml, pytest.mark.timeout(600)]
COLORS = ("red", "green", "blue", "white", "black", "brown")
ROWS = [
    {"messages": [{"role": "user", "content": f"color {n % 6}"}, {"role": "assistant", "content": COLORS[n % 6]}]}
    for n in range(60)
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with the real trainer and engine, and the tiny model in one of its model folders."""
    folder = tmp_path_factory.mktemp("real")
    tiny = folder / "models" / "tiny"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(tiny)], check=True, capture_output=True)
    end_elsewhere(tiny, folder / "models" / "elsewhere")
    live = launch(folder, "+trainer=sft", f"models.dirs=[{folder / 'models'}]", mock=False)
    yield live
    live.stop()


def end_elsewhere(model: Path, copy: Path) -> None:
    """The same model, to whose own files another token is the end than to its chat template, like many base models."""
    shutil.copytree(model, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(copy)
    for name in ("config.json", "generation_config.json"):
        file = copy / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": tokenizer.eos_token_id}))


def train(server: LiveServer, model: str = "tiny", *, validated: bool = True, **hyperparameters):
    options = {"n_epochs": 12, "batch_size": 10, "learning_rate": 3e-3, **hyperparameters}
    return server.client.fine_tuning.jobs.create(
        model=model,
        training_file=server.upload(ROWS),
        validation_file=server.upload(ROWS[:12]) if validated else None,
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": options}},
    )


def metrics(server: LiveServer, job_id: str, name: str) -> list[float]:
    page = server.client.fine_tuning.jobs.list_events(job_id, limit=100)
    return [event.data[name] for event in list(page)[::-1] if event.type == "metrics" and name in event.data]


def ask(client: openai.OpenAI, model: str, text: str, **options):
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=12, **options
    )


@pytest.fixture(scope="module")
def trained(real: LiveServer):
    """One job with full weights, one with LoRA."""
    jobs = [train(real, lora=None), train(real, lora={"r": 8}, n_epochs=2)]
    return [real.wait(job.id, seconds=300) for job in jobs]


def test_full_weights_learn_what_they_are_taught(real, trained):
    job = trained[0]
    assert job.status == "succeeded", job.error
    losses = metrics(real, job.id, "train_loss")
    assert losses[-1] < losses[0] / 4
    assert metrics(real, job.id, "valid_loss")[-1] < 1.0
    right = sum(
        ask(real.client, job.fine_tuned_model, f"color {n}", temperature=0).choices[0].message.content == COLORS[n]
        for n in range(6)
    )
    assert right >= 5
    assert ask(real.client, "tiny", "color 1", temperature=0).choices[0].message.content != COLORS[1]


def test_hyperparameters_are_resolved_and_reported(real, trained):
    shown = trained[0].hyperparameters
    assert (shown.n_epochs, shown.batch_size, shown.learning_rate_multiplier) == (12, 10, 1.0)
    assert trained[0].trained_tokens > 1000


def test_continue_an_adapter(real, trained):
    """On the rows that it was validated with: it begins where the adapter has ended, and what comes of it is served."""
    first, create = trained[1], real.client.fine_tuning.jobs.create
    rows = real.upload(ROWS[:12])

    def further(model: str, **hyperparameters):
        options = {"n_epochs": 2, "batch_size": 12, "learning_rate": 1e-4, **hyperparameters}
        method = {"type": "supervised", "supervised": {"hyperparameters": options}}
        return create(model=model, training_file=rows, validation_file=rows, seed=3, method=method)

    second = real.wait(further(first.fine_tuned_model).id)
    assert second.status == "succeeded", second.error
    assert second.model == first.fine_tuned_model
    before, after = metrics(real, first.id, "valid_loss"), metrics(real, second.id, "train_loss")
    assert after[0] == pytest.approx(before[-1], rel=1e-4)
    assert after[-1] < after[0]
    third = real.wait(further(second.fine_tuned_model, lora={"r": 8}, n_epochs=1).id)
    before, after = metrics(real, second.id, "valid_loss"), metrics(real, third.id, "train_loss")
    assert after[0] == pytest.approx(before[-1], rel=1e-4)
    lineage = [third.fine_tuned_model]
    while parent := getattr(real.client.models.retrieve(lineage[-1]), "parent", None):
        lineage.append(parent)
    assert lineage == [third.fine_tuned_model, second.fine_tuned_model, first.fine_tuned_model, "tiny"]
    assert ask(real.client, third.fine_tuned_model, "color 3", temperature=0).choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="has 8") as refused:
        further(first.fine_tuned_model, lora={"r": 16})
    assert refused.value.param == "method.supervised.hyperparameters.lora.r"


def test_every_checkpoint_and_both_kinds_of_model_answer_and_do_not_mix(real, trained):
    full, lora = trained
    checkpoints = list(real.client.fine_tuning.jobs.checkpoints.list(lora.id))
    assert len(checkpoints) == 2
    names = ["tiny", full.fine_tuned_model, lora.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint]
    alone = {name: ask(real.client, name, "color 3", temperature=0).choices[0].message.content for name in names}
    found: dict[str, str] = {}

    def collect(name: str) -> None:
        found[name] = ask(real.client, name, "color 3", temperature=0).choices[0].message.content

    threads = [threading.Thread(target=collect, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len(set(alone.values())) >= 3


def test_what_the_template_leaves_out_fails_the_job_before_it_is_queued(real):
    models = real.storage.parent / "models"
    shutil.copytree(models / "tiny", models / "content-only")
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (models / "content-only" / "chat_template.jinja").write_text(template)
    call = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"color": "red"}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [*ROWS[:20], {"messages": [{"role": "user", "content": "Paint it"}, calling]}]
    job = real.client.fine_tuning.jobs.create(
        model="content-only",
        training_file=real.upload(rows),
        method={"type": "supervised", "supervised": {"hyperparameters": {"max_steps": 1}}},
    )
    job = real.wait(job.id, seconds=300)
    assert (job.status, job.error.code, job.error.param) == ("failed", "invalid_training_file", "training_file")
    assert "line 21: the model's chat template leaves out messages[1].tool_calls[0].function.name" in job.error.message
    events = real.client.fine_tuning.jobs.list_events(job.id, limit=100)
    assert not [event.message for event in events if "queued" in event.message]


def test_an_adapter_brings_the_end_of_turn_that_it_learned(real):
    job = real.wait(train(real, "elsewhere", lora={"r": 4}, max_steps=2).id, seconds=300)
    assert job.status == "succeeded", job.error
    end = AutoTokenizer.from_pretrained(real.storage.parent / "models" / "tiny").convert_tokens_to_ids("<|im_end|>")

    def answer(model: str):
        # Whether two steps taught it to end is left to no chance.
        return ask(real.client, model, "color 1", temperature=0, logit_bias={str(end): 100})

    taught, base = answer(job.fine_tuned_model), answer("elsewhere")
    assert (taught.choices[0].finish_reason, taught.usage.completion_tokens) == ("stop", 1)
    assert (base.choices[0].finish_reason, base.usage.completion_tokens) == ("length", 12)


def test_the_engine_is_asked_as_the_trainer_taught(real):
    from arbor_trl.chat import IGNORED, ChatFormat

    tool = {"type": "function", "function": {"name": "f<|im_end|>", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "<|im_start|>"}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "<|im_end|>"},
    ]
    options = {"model": "tiny", "tools": [tool], "max_tokens": 1, "extra_body": {"return_token_ids": True}}
    asked = real.client.chat.completions.create(messages=messages, **options).prompt_token_ids
    chat = ChatFormat(AutoTokenizer.from_pretrained(real.storage.parent / "models" / "tiny"))
    silent = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]
    row = {"messages": [*silent, {"role": "assistant", "content": "yes<|im_end|>"}], "tools": [tool]}
    (sample,) = chat.encode(chat.render(row))
    taught = sample.ids[: next(at for at, label in enumerate(sample.labels) if label != IGNORED)]
    assert asked == taught
    end = chat.chats.tokens["<|im_end|>"]
    assert taught.count(end) == 4 and sample.last_trained == end and sample.ids.count(end) == 5


def test_streaming_says_the_same_and_log_probabilities_add_up(real, trained):
    model = trained[0].fine_tuned_model
    plain = ask(real.client, model, "color 2", temperature=0, logprobs=True, top_logprobs=3)
    stream = ask(real.client, model, "color 2", temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    for token in plain.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001


def test_a_result_that_does_not_answer_is_no_model(real):
    """Neither in lists, nor for a completion, nor to begin another job with, by whatever name."""
    job = train(real, lora={"r": 4}, learning_rate=1e38, weight_decay=1e10, max_steps=1)
    ended = real.wait(job.id, seconds=300)
    assert (ended.status, ended.error.code, ended.fine_tuned_model) == ("failed", "result_unusable", None)
    assert list(real.client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    name = f"ft:tiny:{job.organization_id}::{job.id[-8:]}:ckpt-step-1"
    assert "checkpoint 1-1 is not used" in str([event.message for event in events_of(real, job.id)])
    assert not any(job.id[-8:] in model.id for model in real.client.models.list())
    for model in (name, job.id, f"{job.id}:best"):
        with pytest.raises(openai.NotFoundError):
            ask(real.client, model, "color 1")
        with pytest.raises(openai.NotFoundError):
            train(real, model)


def events_of(server: LiveServer, job_id: str) -> list:
    return list(server.client.fine_tuning.jobs.list_events(job_id, limit=100))


def test_checkpoints_that_are_not_kept_are_not_offered(real):
    job = train(real, validated=False, lora=None, max_steps=6, checkpoint_steps=2, keep_checkpoints=2)
    job = real.wait(job.id, seconds=300)
    assert [point.step_number for point in real.client.fine_tuning.jobs.checkpoints.list(job.id)] == [6, 4]
    assert len(list((real.storage / "jobs" / job.id / "checkpoints").glob("*-*"))) == 2
    with pytest.raises(openai.NotFoundError):
        ask(real.client, f"{job.fine_tuned_model}:ckpt-step-2", "color 1")


def test_a_killed_trainer_goes_on_from_its_checkpoint(real):
    job = train(real, lora=None, n_epochs=20, checkpoint_steps=5, max_steps=60)
    folder = real.storage / "jobs" / job.id
    until((folder / "checkpoints" / "5-1").is_dir, 300, pause=0.005)
    os.kill(int((folder / "attempts" / "1" / "keeper").read_text().split(":")[0]), signal.SIGKILL)
    job = real.wait(job.id, seconds=300)
    assert job.status == "succeeded", job.error
    said = [event.message for event in real.client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("attempt 2 starts from the checkpoint" in text for text in said)
    steps = metrics(real, job.id, "step")
    assert steps[-1] == 60 and set(steps) == set(range(1, 61))


@pytest.mark.parametrize(
    ("hyperparameters", "code", "param", "says"),
    [
        pytest.param({"learing_rate": 1}, "unknown_parameter", "learing_rate", "learning_rate", id="row-57"),
        pytest.param({"n_epochs": 51}, "integer_above_max_value", "n_epochs", "50", id="row-58-epochs"),
        pytest.param({"batch_size": 257}, "integer_above_max_value", "batch_size", "256", id="row-58-batch"),
        pytest.param({"learning_rate": 0}, "invalid_value", "learning_rate", "0", id="row-58-rate"),
        pytest.param({"lora": {"rr": 3}}, "unknown_parameter", "lora.rr", "'r'", id="row-57-nested"),
    ],
)
def test_a_wrong_hyperparameter_is_named(real, hyperparameters, code, param, says):
    with pytest.raises(openai.BadRequestError) as caught:
        train(real, **hyperparameters)
    assert caught.value.code == code
    assert caught.value.param == f"method.supervised.hyperparameters.{param}"
    assert says in str(caught.value)


def test_a_method_without_its_plugin_names_the_package(real):
    with pytest.raises(openai.BadRequestError, match="pip install arbor-dpo"):
        real.client.fine_tuning.jobs.create(model="tiny", training_file=real.upload(ROWS), method={"type": "dpo"})


def test_the_server_never_imports_a_deep_learning_library():
    heavy = ["torch", "transformers", "trl", "peft", "vllm", "accelerate", "deepspeed"]
    code = (
        "import sys, arbor_core.server.app, arbor_core.application.system, arbor_core.cli.main;"
        "from arbor_core import plugins;"
        "loaded = plugins.load(); [loaded.all(kind) for kind in plugins.KINDS]; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(heavy) & set(done.stdout.split())
