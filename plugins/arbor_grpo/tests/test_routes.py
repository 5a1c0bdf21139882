"""GRPO's routes in the styles of all clients, with the mock trainer: what is answered, and every error."""

from __future__ import annotations

import contextlib
import signal
import sqlite3

import pytest
from grpo_http import GRPO, MODEL, Job, call, created, group, item, signal_worker
from live import LiveServer
from waiting import until

STATUS = {
    *("job_id", "status", "current_model", "checkpoints", "last_checkpoint", "pending_batch_ids"),
    *("policy_version", "groups", "error"),
}
STOCK = {
    "run_name": None,
    "model": f"openai/arbor:{MODEL}",
    "trainer_config": {
        "temperature": 1.0,
        "beta": 0.0,
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-6,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
        "max_prompt_length": None,
        "max_completion_length": None,
        "soft_completion_penalty_length": None,
        "gradient_checkpointing_kwargs": None,
        "max_seq_len": None,
        "lora_config": None,
        "mask_truncated_completions": True,
        "bf16": False,
        "scale_rewards": True,
        "max_grad_norm": 1.0,
        "report_to": "none",
        "log_completions": True,
        "logging_steps": 10,
        "max_steps": 500,
        "loss_type": "dapo",
        "num_training_gpus": 1,
        "weight_decay": 0.0,
    },
    "inference_config": {"model": MODEL, "max_seq_len": None},
    "gpu_config": {"type": "multi", "multi": {"num_inference_gpus": 1, "num_training_gpus": 1}},
}
"""What arbor-ai 0.2.17 sends."""


TALK = [{"role": "user", "content": "say"}]


@pytest.fixture
def job(live_job: Job) -> Job:
    return live_job


def initialize(server: LiveServer, body: dict[str, object]) -> Job:
    answer = call(server.url, "POST", f"{GRPO}/initialize", body)
    assert answer.status == 200, answer.body
    assert set(answer.json) == STATUS
    assert answer.json["current_model"] == answer.json["job_id"]
    return Job(server, answer.json["job_id"])


def test_the_order_of_calls_of_the_stock_client(server: LiveServer) -> None:
    job = initialize(server, STOCK)
    sent: list[int] = []
    for step in range(3):
        pending = until(lambda: sorted(set(job.status["pending_batch_ids"]) - set(sent)))
        said = [job.sample("one two three", temperature=1.0, top_p=1.0, top_k=-1)["choices"][0] for _ in range(2)]
        if step == 1:
            metadata = {"score": 0.5, "step_index": 1}
            named = job.ok("checkpoint", checkpoint_name="model_checkpoint_best", metadata=metadata)
            assert named["last_checkpoint"] == "model_checkpoint_best"
            assert named["checkpoints"]["model_checkpoint_best"]["metadata"] == metadata
        for batch_id in pending:
            batch = [
                {
                    "messages": [{"role": "user", "content": "one two three"}],
                    "completion": {"role": "assistant", "content": choice["message"]["content"]},
                    "reward": float(k),
                }
                for k, choice in enumerate(said)
            ]
            answer = job.ok(
                "step",
                model=job.id,
                batch_id=batch_id,
                batch=batch,
                metrics={"validation_score": 300.0, "format_failures": 0},
            )
            assert answer["current_model"] == job.id
            sent.append(batch_id)
    done = job.ok("terminate")
    assert done["status"] == "succeeded"
    assert job.sample()["choices"][0]["message"]["content"], "the job's id goes on answering"
    config = call(server.url, "GET", f"/v1/fine_tuning/jobs/{job.id}").json["hyperparameters"]
    assert config["groups_per_step"] == 2
    assert config["max_group_age"] == 64
    warned = [event["message"] for event in job.events() if event["level"] == "warn"]
    assert any("report_to" in text and "bf16" in text for text in warned)


def test_flat_bodies_and_ids_in_the_path(server: LiveServer) -> None:
    body = {
        "model": MODEL,
        "suffix": "run-1",
        "num_generations": 2,
        "temperature": 0.9,
        "beta": 0.04,
        "num_iterations": 1,
        "gradient_accumulation_steps": 1,
        "lora": False,
        "max_context_length": None,
        "grpo_flavor": "mmgrpo",
        "wandb_kwargs": {},
        "gpu_config": {"type": "multi", "multi": {"num_inference_gpus": 1, "num_training_gpus": 1}},
    }
    job = initialize(server, body)
    url = f"{GRPO}/{job.id}"
    for step in range(2):
        sent = call(server.url, "POST", f"{url}/step", {"job_id": "other", "model": "x", "batch": group()})
        assert (sent.status, sent.json["tokenized"]) == (200, 2), sent.body
        assert sent.json["batch_id"] == step
    named = call(server.url, "POST", f"{url}/checkpoint", {"job_id": job.id, "checkpoint_name": "best"}).json
    assert named["checkpoints"][named["last_checkpoint"]].startswith("ft:mock/tiny:arbor:run-1:")
    done = call(server.url, "POST", f"{url}/terminate")
    assert (done.status, done.json["status"]) == (200, "succeeded")
    again = call(server.url, "POST", f"{url}/terminate")
    assert (again.status, again.json["status"]) == (200, "succeeded")


def test_bodies_without_a_job(server: LiveServer) -> None:
    job = initialize(server, {"model": MODEL, "num_generations": 2})
    sent = call(server.url, "POST", f"{GRPO}/step", {"model": "x", "batch": group()})
    assert (sent.status, sent.json["job_id"]) == (200, job.id)
    named = call(server.url, "POST", f"{GRPO}/checkpoint", {"checkpoint_name": "best"}).json
    assert isinstance(named["checkpoints"]["best"], str)
    done = call(server.url, "POST", f"{GRPO}/terminate")
    assert (done.status, done.json["job_id"], done.json["status"]) == (200, job.id, "succeeded")


def test_nested_groups(server: LiveServer, job: Job) -> None:
    calls = [{key: value for key, value in item(None).items() if key != "reward"} | {"advantage": 0.5} for _ in "ab"]
    answer = call(server.url, "POST", f"{GRPO}/{job.id}/step", {"batch": [calls, [{**calls[0], "advantage": -0.5}]]})
    assert (answer.status, answer.json["tokenized"]) == (200, 3), answer.body
    job.post("step", batch=[calls, item(1)]).error(400, "invalid_rollout", "batch")
    job.post("step", batch=[calls, []]).error(400, "invalid_rollout", "batch[1]")
    mixed = [[calls[0], {**calls[1], "advantage": 0.7}], calls]
    job.post("step", batch=mixed).error(400, "invalid_rollout", "batch[0][0]")
    job.post("step", batch=[item(1, advantage=1.0), item(2)]).error(400, "invalid_rollout", "batch")


def test_creation_in_openais_way(server: LiveServer) -> None:
    method = {"type": "grpo", "grpo": {"hyperparameters": {"num_generations": 2}}}
    made = call(server.url, "POST", "/v1/fine_tuning/jobs", {"model": MODEL, "method": method})
    assert made.status == 200, made.body
    job = Job(server, made.json["id"])
    assert job.step()["accepted"]
    assert job.ok("cancel")["status"] == "cancelled"


def test_a_checkpoint_can_be_gone_on_from(server: LiveServer, job: Job) -> None:
    job.step()
    job.handled(1)
    name = job.ok("checkpoint", checkpoint_name="best")["checkpoints"]["best"]["checkpoint_dir"]
    further = initialize(server, {"model": f"openai/arbor:{name}", "num_generations": 2})
    assert further.until("running")["policy_version"] == 0
    further.post("cancel")


@pytest.mark.parametrize(
    ("config", "param", "code"),
    [
        ({"num_generations": "two"}, "trainer_config.num_generations", "invalid_type"),
        ({"gradient_accumulation_steps": 0}, "trainer_config.gradient_accumulation_steps", "invalid_value"),
        ({"temperature": 0}, "trainer_config.temperature", "invalid_value"),
        ({"max_staleness": "x"}, "trainer_config.max_staleness", "invalid_type"),
        ({"num_training_gpus": 99}, "num_gpus", "invalid_gpu"),
        ({"num_training_gpus": "all"}, "num_gpus", "invalid_type"),
        ({"seed": "x"}, "seed", "invalid_type"),
    ],
)
def test_wrong_values_of_known_keys(server: LiveServer, config: dict[str, object], param: str, code: str) -> None:
    call(server.url, "POST", f"{GRPO}/initialize", {"model": MODEL, "trainer_config": config}).error(400, code, param)


def test_other_bodies_that_begin_nothing(server: LiveServer) -> None:
    def refused(body: object, code: str, param: str | None = None, status: int = 400) -> None:
        call(server.url, "POST", f"{GRPO}/initialize", body).error(status, code, param)

    refused({}, "missing_required_parameter", "model")
    refused(b"[]", "invalid_json")
    refused(b"", "invalid_json")
    refused({"model": 3}, "invalid_type", "model")
    refused({"model": MODEL, "trainer_config": []}, "invalid_type", "trainer_config")
    refused({"model": MODEL, "suffix": "z/../../escaped"}, "invalid_suffix", "suffix")
    refused({"model": "x --trust-remote-code"}, "invalid_model", "model")


def test_a_run_name_is_only_shown(server: LiveServer) -> None:
    job = initialize(server, {"model": MODEL, "run_name": "z/../../escaped", "trainer_config": {"tempratur": 1}})
    shown = call(server.url, "GET", f"/v1/fine_tuning/jobs/{job.id}").json
    assert shown["metadata"] == {"run_name": "z/../../escaped"}
    assert any("'tempratur' (did you mean 'temperature'?)" in event["message"] for event in job.events())
    job.post("cancel")


@pytest.mark.parametrize("route", ["status", "step", "rewards", "checkpoint", "cancel", "terminate"])
def test_unknown_jobs(server: LiveServer, route: str) -> None:
    body = {"job_id": "nope", "batch": group(), "rewards": [], "checkpoint_name": "x"}
    call(server.url, "POST", f"{GRPO}/{route}", body).error(404, "fine_tune_not_found", "fine_tune_id")


def test_jobs_that_learn_from_files_are_left_alone(server: LiveServer) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 10
    method = {"type": "supervised", "supervised": {"hyperparameters": {"steps": 1000, "step_seconds": 60}}}
    body = {"model": MODEL, "training_file": server.upload(rows), "method": method}
    job = Job(server, call(server.url, "POST", "/v1/fine_tuning/jobs", body).json["id"])

    def refused() -> None:
        for path in ("status", "step", "rewards", "checkpoint", "terminate", "cancel"):
            answer = job.post(path, batch=group(), rewards=[], checkpoint_name="x")
            error = answer.error(400, "invalid_job_state", "job_id")
            assert "not a job that learns from rollouts" in error["message"]

    server.wait(job.id, "running")
    refused()
    assert not (job.dir / "asked").exists()
    assert (job.dir / "desired").read_text() == "run"
    assert call(server.url, "POST", f"/v1/fine_tuning/jobs/{job.id}/cancel").json["status"] != "succeeded"
    server.wait(job.id, "cancelled")
    refused()


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "", "a/b", ".hidden", "x" * 65, "a\x00"])
def test_names_that_no_checkpoint_can_have(job: Job, name: str) -> None:
    job.post("checkpoint", checkpoint_name=name).error(400, "invalid_value", "checkpoint_name")
    assert not (job.dir / "asked").exists()


@pytest.mark.parametrize(
    ("batch", "param", "code"),
    [
        pytest.param([], "batch", "group_size_mismatch", id="row-85-empty"),
        pytest.param([item(1)], "batch", "group_size_mismatch", id="row-85-short"),
        pytest.param([item(1)] * 3, "batch", "group_size_mismatch", id="row-85-long"),
        pytest.param([item(1), item("good")], "batch[1].reward", "invalid_rollout", id="row-78-str"),
        pytest.param([item(1), item(None)], "batch[1].reward", "invalid_rollout", id="row-78-none"),
        pytest.param([item(1), item(10**30)], "batch[1].reward", "invalid_rollout", id="row-78-huge"),
        pytest.param([item(1), item([1])], "batch[1].reward", "invalid_rollout", id="row-78-list"),
        pytest.param(
            [item(1), {"messages": [], "completion": "x"}], "batch[1].messages", None, id="row-85-no-messages"
        ),
        pytest.param([item(1), {"completion": "x", "reward": 1}], "batch[1].messages", None, id="row-85-key"),
        pytest.param([item(1), {**item(1), "completion": 5}], "batch[1].completion", None, id="row-85-completion"),
        pytest.param(
            [item(1), {**item(1), "messages": [{"content": "x"}]}],
            "batch[1].messages[0].role",
            "invalid_rollout",
            id="row-85-role",
        ),
        pytest.param(
            [item(1), {**item(1), "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}],
            "batch[1].messages[0].content[0].type",
            "invalid_rollout",
            id="row-85-image",
        ),
        pytest.param(
            [item(1), {**item(1), "messages": [*TALK, {"role": "assistant", "tool_calls": ["f()"]}]}],
            "batch[1].messages[1].tool_calls[0]",
            "invalid_rollout",
            id="row-85-call",
        ),
        pytest.param(
            [item(1), {**item(1), "completion": {"tool_calls": [{"name": "f", "arguments": {}}]}}],
            "batch[1].completion.tool_calls[0].function",
            "invalid_rollout",
            id="row-85-flat-call",
        ),
        pytest.param(
            [item(1), {**item(1), "completion": {"role": "user", "content": "x"}}],
            "batch[1].completion.role",
            "invalid_rollout",
            id="row-85-completion-role",
        ),
        pytest.param(
            [item(1), {**item(1), "tools": [{"name": "f"}]}],
            "batch[1].tools[0].function",
            "invalid_rollout",
            id="row-85-tool",
        ),
        pytest.param("all", "batch", "invalid_type", id="row-85-text"),
        pytest.param([item(1), 5], "batch[1]", "invalid_type", id="row-85-number"),
    ],
)
def test_groups_that_are_refused_whole(job: Job, batch: object, param: str, code: str | None) -> None:
    before = job.status
    answer = job.post("step", batch=batch, batch_id=0)
    answer.error(400, code or answer.json["error"]["code"], param)
    after = job.status
    assert (after["pending_batch_ids"], after["groups"]["received"]) == (before["pending_batch_ids"], 0)


def test_metadata_that_every_status_would_repeat(job: Job) -> None:
    job.post("checkpoint", checkpoint_name="big", metadata={"a": "b" * 65_536}).error(400, "invalid_value", "metadata")
    assert job.ok("checkpoint", checkpoint_name="big", metadata={"a": "b" * 60_000})["checkpoints"].keys() == {"big"}


@pytest.mark.parametrize("depth", [65, 600, 958, 965])
def test_row_39_what_is_nested_deeper_than_every_reader_can_follow(server: LiveServer, job: Job, depth: int) -> None:
    """Around 960 it depends on the stack whether one can."""
    deep = "[" * depth + "]" * depth
    named = f'{{"job_id": "{job.id}", "checkpoint_name": "deep", "metadata": {{"a": {deep}}}}}'.encode()
    said = f'{{"messages": [{{"role": "user", "content": "say", "a": {deep}}}], "completion": "x", "reward": 1}}'
    group = f'{{"job_id": "{job.id}", "batch": [{said}, {said}]}}'.encode()

    def refused(path: str, body: bytes, code: str) -> None:
        answer = call(server.url, "POST", f"{GRPO}/{path}", body)
        assert (answer.status, answer.json["error"]["code"]) in [(400, code), (400, "invalid_json")], answer.body
        assert "nested" in answer.json["error"]["message"]

    refused("checkpoint", named, "invalid_value")
    refused("step", group, "invalid_rollout")
    assert not (job.dir / "asked").exists()
    job.step()
    assert job.handled(1)["checkpoints"] == {}
    job.ok("terminate")
    refused("checkpoint", named, "invalid_value")


def test_as_many_names_as_every_status_can_repeat(server: LiveServer) -> None:
    few, many = created(server), created(server)
    for job in (few, many):
        job.until("running")
        assert job.ok("terminate")["status"] == "succeeded"
    for number in range(256):
        many.ok("checkpoint", checkpoint_name=f"n{number}")
    many.post("checkpoint", checkpoint_name="one-more").error(400, "invalid_value", "checkpoint_name")
    assert many.ok("checkpoint", checkpoint_name="n7", metadata={"again": 1})["last_checkpoint"] == "n7"
    for number in range(17):
        few.ok("checkpoint", checkpoint_name=f"n{number}", metadata={"a": "b" * 60_000})
    few.post("checkpoint", checkpoint_name="n17", metadata={"a": "b" * 60_000}).error(400, "invalid_value", "metadata")
    assert few.ok("checkpoint", checkpoint_name="n3", metadata={"a": "b" * 50_000})["last_checkpoint"] == "n3"


def test_names_that_are_asked_for_count(server: LiveServer, job: Job) -> None:
    job.until("running")
    signal_worker(job, signal.SIGSTOP)
    (job.dir / "asked").mkdir()
    for number in range(256):
        (job.dir / "asked" / f"n{number}.json").write_text('{"name": "n", "metadata": {}}')
    job.post("checkpoint", checkpoint_name="one-more").error(400, "invalid_value", "checkpoint_name")


@pytest.mark.parametrize("stored", [65, 2000])
def test_metadata_may_be_nested_and_is_shown_where_it_can_be(server: LiveServer, job: Job, stored: int) -> None:
    deep: dict[str, object] = {}
    for _ in range(63):
        deep = {"a": deep}
    assert job.ok("checkpoint", checkpoint_name="deep", metadata=deep)["checkpoints"]["deep"]["metadata"] == deep
    with contextlib.closing(sqlite3.connect(server.storage / "arbor.db", timeout=10)) as db, db:
        text = '{"a":' * stored + "{}" + "}" * stored
        db.execute("UPDATE named_checkpoints SET metadata=? WHERE job_id=?", (text, job.id))
    assert job.status["checkpoints"]["deep"]["metadata"] == {}


def test_whole_numbers_that_are_too_long(server: LiveServer, job: Job) -> None:
    huge = 10**4000
    job.post("step", batch=[item(1), item(huge)]).error(400, "invalid_rollout", "batch[1].reward")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"maximum": huge}}}
    job.post("step", batch=[item(1), {**item(1), "tools": [tool]}]).error(400, "invalid_rollout", "batch")
    assert job.ok("checkpoint", checkpoint_name="x", metadata={"x": huge})["last_checkpoint"] == "x"
    assert job.step(metrics={"x": huge, "y": 1})["accepted"]
    body = {"model": MODEL, "trainer_config": {"learning_rate": huge}}
    call(server.url, "POST", f"{GRPO}/initialize", body).error(400, "invalid_value", "trainer_config.learning_rate")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_row_85_numbers_that_json_has_not(server: LiveServer, job: Job, word: str) -> None:
    raw = f'{{"job_id":"{job.id}","batch":[{{"messages":[{{"role":"user"}}],"completion":"x","reward":{word}}}]}}'
    answer = call(server.url, "POST", f"{GRPO}/step", raw.encode())
    assert answer.status == 400
    assert job.status["groups"]["received"] == 0


def test_row_78_true_and_false_are_1_and_0(job: Job) -> None:
    job.step([item(True), item(False)])
    job.handled(1)
    metrics = [event["data"] for event in job.events() if event["type"] == "metrics"]
    assert metrics[0]["reward"] == 0.5


def test_row_81_equal_rewards_are_no_error(job: Job) -> None:
    for number in range(2):
        job.step([item(1.0, f"{number}"), item(1.0, f"{number}")])
    job.handled(2)
    metrics = [event["data"] for event in job.events() if event["type"] == "metrics"]
    assert [values["frac_reward_zero_std"] for values in metrics] == [1.0, 1.0]


def test_row_83_empty_completions_are_taken(job: Job) -> None:
    assert job.step([item(0, ""), {**item(1), "completion": {"role": "assistant", "content": None}}])["accepted"]
    job.handled(1)


def test_cancelling_twice(job: Job) -> None:
    assert job.ok("cancel")["status"] == "cancelled"
    assert job.ok("cancel")["status"] == "cancelled"
    error = job.post("step", batch=group()).error(400, "invalid_job_state", "job_id")
    assert "cancelled" in error["message"]


def test_row_86_steps_after_the_end(job: Job) -> None:
    job.step()
    job.handled(1)
    assert job.ok("terminate")["status"] == "succeeded"
    error = job.post("step", batch=group()).error(400, "invalid_job_state", "job_id")
    assert "terminated" in error["message"]
    job.post("rewards", rewards=[]).error(400, "invalid_job_state", "job_id")
    assert job.ok("checkpoint", checkpoint_name="last")["checkpoints"]["last"]["global_step"] == 1


def test_row_86_a_job_that_has_made_its_steps(server: LiveServer) -> None:
    """A client waits for ids, for ever: it is offered new ones and hears that they are not needed."""
    job = created(server, max_steps=1)
    job.step(batch_id=0)
    job.until("succeeded")
    seen: set[int] = set()
    for _ in range(3):
        fresh = set(job.status["pending_batch_ids"]) - seen
        assert fresh
        seen |= fresh
        answer = job.step(batch_id=fresh.pop())
        assert (answer["accepted"], answer["status"]) == (False, "succeeded")
        assert "max_steps" in answer["message"]
    assert job.ok("terminate")["status"] == "succeeded"


def test_a_trainer_that_dies_at_the_start_is_heard_of(server: LiveServer) -> None:
    job = created(server, fault="fail", fault_step=0)
    status = job.until("failed")
    assert status["error"]["code"] == "mock_failure"
    assert len(status["pending_batch_ids"]) == 1
    error = job.post("step", batch=group(), batch_id=status["pending_batch_ids"][0]).error(
        400, "invalid_job_state", "job_id"
    )
    assert "told to fail" in error["message"]
    job.post("terminate").error(400, "invalid_job_state", "job_id")
    job.post("checkpoint", checkpoint_name="x").error(400, "invalid_job_state", "job_id")


def test_launch_and_kill(server: LiveServer) -> None:
    said = call(server.url, "POST", "/v1/chat/launch", {"model": f"arbor:{MODEL}", "launch_kwargs": {}})
    assert (said.status, said.json["model"]) == (200, f"arbor:{MODEL}")
    call(server.url, "POST", "/v1/chat/launch", {"model": "ft:nope"}).error(404, "model_not_found", "model")
    for body in (b"", {"job_id": "*"}):
        assert call(server.url, "POST", "/v1/chat/kill", body).status == 200


def test_the_routes_are_in_the_document(server: LiveServer) -> None:
    paths = call(server.url, "GET", "/schema/openapi.json").json["paths"]
    for name in ("initialize", "status", "step", "rewards", "checkpoint", "cancel", "terminate"):
        assert "requestBody" in paths[f"{GRPO}/{name}"]["post"], name
    assert {f"{GRPO}/{{job_id}}/{name}" for name in ("step", "checkpoint", "cancel", "terminate")} <= set(paths)
