"""The life of a job, on a real server with the mock trainer: states, events, devices, crashes, restarts."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from random import Random

import pytest
from jobs import (
    alive,
    awaited_supervisor,
    create,
    events,
    go_on,
    hanging,
    held,
    messages,
    pause,
    step_events,
    stopped,
    supervisor_of,
)
from mutations import mutated
from waiting import until

from arbor_core.testing.invariants import attempt_log, processes
from arbor_core.types import MetricsEvent


def test_a_job_goes_through_every_state_in_order(server, chat_rows):
    job = create(server, chat_rows, suffix="life")
    assert job.status == "validating_files" and job.finished_at is None
    job = server.wait(job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:mock/tiny:arbor:life:{job.id[-8:]}"
    assert job.finished_at >= job.created_at and job.trained_tokens > 0
    said = messages(server, job.id)
    order = ["Created fine-tuning job", "Validating", "Files validated", "started", "New fine-tuned model", "success"]
    positions = [next(n for n, text in enumerate(said) if word in text) for word in order]
    assert positions == sorted(positions)
    assert step_events(server, job.id) == [1, 2, 3, 4, 5]
    csv = server.client.files.content(job.result_files[0]).text.splitlines()
    assert csv[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy" and len(csv) == 6


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        pytest.param(b'{"messages": [' * 12, "invalid_training_file", "line 1: not JSON", id="row-2"),
        pytest.param(b'{"messages":[{"role":"assistant","content":"a"}]}\n' * 3, "invalid_n_examples", "3", id="row-3"),
        pytest.param(b'{"a": "\xff"}\n' * 12, "invalid_training_file", "not UTF-8 at byte 7", id="row-5"),
        pytest.param(b'{"a": NaN}\n' * 12, "invalid_training_file", "NaN", id="row-6"),
        pytest.param(b"[" * 200_000, "invalid_training_file", "nested too deeply", id="row-8"),
        pytest.param(b'{"x": "' + b"y" * (17 << 20), "invalid_training_file", "line too long", id="row-7"),
        pytest.param(b'{"input": {"messages": []}}\n' * 12, "invalid_training_file", "'messages' (found", id="row-61"),
        pytest.param(
            b'{"messages":[{"role":"user","content":"a"}]}\n' * 12,
            "invalid_training_file",
            "12 line(s) of the training file cannot be used: line 1 and 11 more: no assistant message",
            id="row-62",
        ),
        pytest.param(
            b'{"messages":[{"role":"assistant","tool_calls":["f()"]}]}\n' * 12,
            "invalid_training_file",
            "Invalid 'messages[0].tool_calls[0]': Expected `object`, got `str`.",
            id="row-62-call",
        ),
    ],
)
def test_a_file_that_cannot_be_used_fails_the_job_with_its_line(server, raw, code, says):
    job = create(server, raw)
    job = server.wait(job.id, "failed")
    assert job.error.code == code and job.error.param == "training_file"
    assert says in job.error.message
    assert events(server, job.id)[-1].level == "error"
    assert server.client.files.content(job.training_file).content == raw


def test_files_with_faults_fail_before_the_queue_or_train(server):
    random = Random(15)
    jobs = [create(server, mutated(random)) for _ in range(6)]
    ended = [server.wait(job.id) for job in jobs]
    assert {job.status for job in ended} == {"succeeded", "failed"}
    for job in ended:
        if job.status == "failed":
            assert job.error.code in ("invalid_training_file", "invalid_n_examples"), job.error
            assert not any("queued" in text for text in messages(server, job.id))


def test_row_4_oddities_are_accepted_and_counted(server, chat_rows):
    import json

    raw = b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in chat_rows)
    job = create(server, raw)
    assert server.wait(job.id).status == "succeeded"
    assert any("blank line skipped (11 time(s), first at line 2)" in text for text in messages(server, job.id))
    assert server.client.files.content(job.training_file).content == raw


def test_an_empty_validation_file_is_named(server, chat_rows):
    bad = server.upload(b"{}\n")
    job = create(server, chat_rows, validation_file=bad)
    job = server.wait(job.id, "failed")
    assert (job.error.code, job.error.param) == ("invalid_validation_file", "validation_file")


def test_a_trainer_that_fails_says_why(server, chat_rows):
    job = create(server, chat_rows, hyperparameters={"steps": 5, "fault": "fail", "fault_step": 3})
    job = server.wait(job.id, "failed")
    assert job.error.message and job.error.code
    assert step_events(server, job.id)[-1] in (2, 3)
    until(lambda: supervisor_of(server, job.id) == 0)


def test_row_89_a_trainer_that_keeps_dying_is_given_up(server, chat_rows):
    job = create(
        server, chat_rows, hyperparameters={"steps": 5, "fault": "crash", "fault_times": 9, "checkpoint_steps": 5}
    )
    job = server.wait(job.id, "failed")
    assert job.error.code == "worker_crashed"
    assert sum("attempt" in text and "died" in text for text in messages(server, job.id)) >= 2


def test_row_89_a_killed_attempt_is_taken_up_again(start_server, chat_rows):
    server = start_server()
    job = create(server, chat_rows, hyperparameters=hanging(7, steps=40, checkpoint_steps=5))
    until(lambda: stopped(server, job.id))
    os.kill(awaited_supervisor(server, job.id), signal.SIGKILL)
    job = server.wait(job.id)
    assert job.status == "succeeded"
    assert any("its supervisor was lost" in text and "from the checkpoint" in text for text in messages(server, job.id))
    assert max(step_events(server, job.id)) == 40
    assert held(server) == 0


def test_row_97_row_98_cancelling_a_running_job_ends_its_processes(start_server, chat_rows):
    server = start_server()
    job = create(server, chat_rows, hyperparameters={"steps": 1000, "step_seconds": 0.1, "checkpoint_steps": 2})
    until(lambda: list(server.client.fine_tuning.jobs.checkpoints.list(job.id)))
    supervisor = awaited_supervisor(server, job.id)
    assert server.client.fine_tuning.jobs.cancel(job.id).status in ("running", "cancelled")
    job = server.wait(job.id, "cancelled")
    until(lambda: not alive(supervisor))
    assert held(server) == 0 and job.error is None
    assert server.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    checkpoint = server.client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
    answer = server.client.chat.completions.create(
        model=checkpoint.fine_tuned_model_checkpoint, messages=[{"role": "user", "content": "still there?"}]
    )
    assert answer.choices[0].message.content


def test_row_96_row_103_one_device_one_job_and_cancelling_in_the_queue(start_server, chat_rows):
    server = start_server("gpu.train=[0]")
    first = create(server, chat_rows, hyperparameters={"steps": 1000, "step_seconds": 0.05})
    server.wait(first.id, "running")
    second, third = create(server, chat_rows), create(server, chat_rows)
    for job in (second, third):
        server.wait(job.id, "queued")
    until(lambda: "Waiting for a device" in messages(server, third.id))
    assert server.client.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    assert server.client.fine_tuning.jobs.retrieve(third.id).status == "queued"
    server.client.fine_tuning.jobs.cancel(first.id)
    assert server.wait(third.id).status == "succeeded"
    assert not any("started" in text for text in messages(server, second.id))


def test_row_101_row_102_pause_frees_the_device_and_resume_goes_on(start_server, chat_rows):
    server = start_server("gpu.train=[0]")
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    job = create(server, chat_rows, hyperparameters=hanging(5, steps=60))
    until(lambda: stopped(server, job.id))
    pause(server, job.id)
    assert held(server) == 0
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    other = create(server, chat_rows)
    assert server.wait(other.id).status == "succeeded"
    client.fine_tuning.jobs.resume(job.id)
    assert server.wait(job.id).status == "succeeded"
    steps = step_events(server, job.id)
    assert steps[-1] == 60 and len(steps) == len(set(steps))  # no step was trained twice


def test_row_91_training_goes_on_while_the_server_is_dead(start_server, chat_rows):
    server = start_server()
    job = create(server, chat_rows, hyperparameters=hanging(5, steps=60, step_seconds=0.05))
    until(lambda: stopped(server, job.id))
    supervisor = awaited_supervisor(server, job.id)
    server.stop(signal.SIGKILL)
    assert alive(supervisor)
    go_on(server, job.id)
    log = lambda: attempt_log(server.storage, job.id, 1)  # noqa: E731
    until(lambda: [event.step for event in log() if isinstance(event, MetricsEvent)][-1] > 5)
    again = start_server()
    assert again.wait(job.id).status == "succeeded"
    assert step_events(again, job.id) == list(range(1, 61))  # none lost, none twice
    assert held(again) == 0
    assert not any("attempt 2" in text for text in messages(again, job.id))


def change(server, sql, *values):
    with sqlite3.connect(server.storage / "arbor.db") as db:
        db.execute(sql, values)


def test_an_attempt_is_found_again_whose_start_was_not_written_down(start_server, chat_rows):
    server = start_server()
    job = create(server, chat_rows, hyperparameters=hanging(5, steps=60))
    until(lambda: stopped(server, job.id))
    server.stop(signal.SIGKILL)
    change(server, "UPDATE jobs SET ref=NULL WHERE id=?", job.id)
    again = start_server()
    go_on(server, job.id)
    assert again.wait(job.id).status == "succeeded"
    assert step_events(again, job.id) == list(range(1, 61))
    assert held(again) == 0


@pytest.mark.parametrize("line", [b"nonsense\n", b'{"type":"checkpoint","step":3}\n'], ids=["damaged", "incomplete"])
@pytest.mark.parametrize("asked", ["nothing", "cancel"])
def test_a_job_whose_events_cannot_be_taken_ends_and_frees_its_device(start_server, chat_rows, line, asked):
    server = start_server("gpu.train=[0]")
    job = create(server, chat_rows, hyperparameters={"steps": 999, "step_seconds": 0.05})
    until(lambda: step_events(server, job.id))
    supervisor = awaited_supervisor(server, job.id)
    if asked == "cancel":
        os.kill(supervisor, signal.SIGSTOP)  # the line comes before the end
        server.client.fine_tuning.jobs.cancel(job.id)
    with (server.storage / "jobs" / job.id / "attempts" / "1" / "events.jsonl").open("ab") as log:
        log.write(line)
    if asked == "cancel":
        os.kill(supervisor, signal.SIGCONT)
        assert server.wait(job.id).status == "cancelled"
    else:
        job = server.wait(job.id, "failed")
        assert job.error.code == "event_log_damaged" and f"jobs/{job.id}/attempts/1/events.jsonl" in job.error.message
    assert not alive(supervisor)
    after = create(server, chat_rows, hyperparameters={"steps": 1})
    assert server.wait(after.id).status == "succeeded"
    assert held(server) == 0


def test_an_attempt_that_never_began_is_no_crash(start_server, chat_rows):
    server = start_server("limits.attempts=1")
    job = create(server, chat_rows, hyperparameters=hanging(1, steps=60))
    until(lambda: stopped(server, job.id))
    supervisor = awaited_supervisor(server, job.id)
    server.stop(signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not processes(server.storage / "jobs" / job.id))
    shutil.rmtree(server.storage / "jobs" / job.id / "attempts")
    change(server, "UPDATE jobs SET ref=NULL, offset=0 WHERE id=?", job.id)
    again = start_server("limits.attempts=1")
    assert again.wait(job.id).status == "succeeded"
    assert "The server ended before attempt 1 began; another one starts" in messages(again, job.id)


def test_a_job_on_several_simulated_devices(server, chat_rows):
    job = create(server, chat_rows, extra_body={"num_gpus": 3})
    job = server.wait(job.id)
    assert job.status == "succeeded", job.error
    devices = next(event.data["devices"] for event in events(server, job.id) if "started" in event.message)
    assert len(devices) == 3
    assert step_events(server, job.id) == [1, 2, 3, 4, 5]


def test_a_job_that_a_server_cannot_run_waits_and_holds_nobody_back(start_server, chat_rows):
    server = start_server("gpu.train=[0]", "limits.queued_jobs=9")
    running = create(server, chat_rows, hyperparameters={"steps": 999, "step_seconds": 0.05})
    server.wait(running.id, "running")
    one, other = create(server, chat_rows), create(server, chat_rows)
    for job in (one, other):
        server.wait(job.id, "queued")
    supervisor = awaited_supervisor(server, running.id)
    server.stop(signal.SIGKILL)
    os.kill(supervisor, signal.SIGKILL)
    until(lambda: not processes(server.storage / "jobs" / running.id))
    change(server, "UPDATE jobs SET spec=json_set(spec, '$.devices', 2) WHERE id=?", one.id)
    change(server, "UPDATE jobs SET status='queued', desired='run' WHERE id IN (?, ?)", one.id, other.id)
    change(server, "UPDATE jobs SET spec=json_set(spec, '$.trainer', 'gone') WHERE id=?", running.id)
    change(server, "UPDATE jobs SET status='queued', desired='run' WHERE id=?", running.id)
    again = start_server("gpu.train=[0]")
    assert again.wait(other.id).status == "succeeded"
    for job, says in ((one, "it needs 2 devices to train on"), (running, "the trainer 'gone' is not installed")):
        assert any(says in text for text in messages(again, job.id))
        assert again.client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_row_114_sigterm_ends_the_server_and_leaves_the_trainer(start_server, chat_rows):
    server = start_server()
    job = create(server, chat_rows, hyperparameters=hanging(3, steps=40))
    until(lambda: stopped(server, job.id))
    supervisor = awaited_supervisor(server, job.id)
    assert server.stop() == 0
    assert alive(supervisor)
    go_on(server, job.id)
    assert start_server().wait(job.id).status == "succeeded"


def test_a_server_that_cannot_dispatch_ends_and_says_so(tmp_path):
    (tmp_path / "data" / "run" / "bell").mkdir(parents=True)
    command = [sys.executable, "-m", "arbor_core", "serve", "port=0", f"storage={tmp_path / 'data'}"]
    env = {**os.environ, "ARBOR_MOCK_GPU": "1", "ARBOR_HOME": str(tmp_path)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 1
    assert "the server cannot go on" in ended.stderr and "run/bell" in ended.stderr


def test_row_109_a_second_server_on_the_same_directory_is_refused(start_server, tmp_path):
    server = start_server()
    with pytest.raises(RuntimeError, match=f"in use by another server .pid {server.process.pid}"):
        start_server()


def test_no_deep_learning_library_is_in_the_server(start_server, chat_rows):
    server = start_server()
    assert server.wait(create(server, chat_rows).id).status == "succeeded"
    mapped = open(f"/proc/{server.process.pid}/maps").read()
    assert "torch" not in mapped and "site-packages/transformers" not in mapped
