"""The trainer in its worker process."""

from __future__ import annotations

import json
import signal

import pytest
from waiting import until

from arbor_core import (
    CheckpointEvent,
    CheckpointWithdrawn,
    ErrorEvent,
    HyperparametersResolved,
    MetricsEvent,
    PausedEvent,
    ResultEvent,
)
from arbor_core.jobdir.checkpoints import fault


def losses(job, attempt=None):
    return {event.step: event.data["train_loss"] for event in job.events(MetricsEvent, attempt)}


def test_a_job_reports_what_a_real_one_reports(job):
    done = job(rows=20, validation=True, n_epochs=2, batch_size=4)
    assert done.run() == 0
    resolved = done.events(HyperparametersResolved)[0].hyperparameters
    assert resolved == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1.0}
    metrics = done.events(MetricsEvent)
    assert [event.step for event in metrics] == list(range(1, 11))
    assert metrics[-1].data["train_loss"] < metrics[0].data["train_loss"] / 1.5
    assert all(0 < event.data["train_mean_token_accuracy"] < 1 for event in metrics)
    assert [event.step for event in metrics if "valid_loss" in event.data] == [5, 10]
    assert [event.step for event in done.events(CheckpointEvent)] == [5, 10]
    result = done.events(ResultEvent)[0]
    assert (result.dir, result.step, result.trained_tokens, result.adapter) == ("10-1", 10, 20 * 3 * 2, True)
    folder = done.dir / "checkpoints" / "10-1"
    assert fault(folder) is None
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_auto_depends_on_the_number_of_rows(job):
    done = job(rows=12)
    assert done.run() == 0
    assert done.events(HyperparametersResolved)[0].hyperparameters == {
        "n_epochs": 8,
        "batch_size": 1,
        "learning_rate_multiplier": 1.0,
    }


def test_the_loss_is_a_function_of_seed_and_step(job):
    one, same, other = job(steps=4, seed=1), job(steps=4, seed=1), job(steps=4, seed=2)
    assert [made.run() for made in (one, same, other)] == [0, 0, 0]
    assert losses(one) == losses(same) != losses(other)
    tensors = [
        (made.dir / "checkpoints" / "4-1" / "adapter_model.safetensors").read_bytes() for made in (one, same, other)
    ]
    assert tensors[0] == tensors[1] != tensors[2]


def test_a_paused_job_goes_on_where_it_stopped(job):
    paused = job(steps=200, step_seconds=0.02, checkpoint_steps=1000)
    process = paused.start()
    until(lambda: len(paused.events(MetricsEvent)) > 2)
    paused.desire("pause")
    assert process.wait(120) == 0
    stopped_at = paused.events(CheckpointEvent)[-1].step
    assert paused.events(PausedEvent)
    assert stopped_at == paused.events(MetricsEvent)[-1].step
    paused.desire("cancel")
    assert paused.run() == 0
    assert [event.step for event in paused.events(MetricsEvent)] == [stopped_at + 1]
    assert not paused.events(ResultEvent)


def test_cancelling_writes_no_checkpoint(job):
    cancelled = job(steps=200, checkpoint_steps=1000)
    cancelled.desire("cancel")
    assert cancelled.run() == 0
    assert not cancelled.events(CheckpointEvent)


def test_fail(job):
    failed = job(steps=5, fault="fail", fault_step=3)
    assert failed.run() == 1
    assert failed.events(ErrorEvent)[0].code == "mock_failure"
    assert len(failed.events(MetricsEvent)) == 3


def test_lose_gpu(job):
    lost = job(steps=5, fault="lose_gpu", fault_step=2)
    assert lost.run() == 1
    error = lost.events(ErrorEvent)[0]
    assert error.code == "device_lost"
    assert "CUDA error: GPU is lost" in error.message


def test_out_of_memory(job):
    hungry = job(steps=5, fault="out_of_memory", fault_step=2)
    assert hungry.run() == 1
    assert hungry.events(ErrorEvent)[0].code == "out_of_memory"


def test_a_crash_is_a_kill_and_the_next_attempt_resumes(job):
    crashed = job(steps=6, checkpoint_steps=2, fault="crash", fault_step=5)
    assert crashed.run() == -signal.SIGKILL
    assert not crashed.events(ErrorEvent)
    assert crashed.run() == 0
    assert sorted(losses(crashed)) == [5, 6]
    undisturbed = job(steps=6)
    assert undisturbed.run() == 0
    assert losses(crashed, 1) | losses(crashed, 2) == losses(undisturbed)


def test_a_crash_may_come_more_than_once(job):
    crashed = job(steps=3, checkpoint_steps=3, fault="crash", fault_step=2, fault_times=2)
    assert [crashed.run() for _ in range(3)] == [-signal.SIGKILL, -signal.SIGKILL, 0]


def test_a_bad_checkpoint_is_not_resumed_from(job):
    damaged = job(steps=6, checkpoint_steps=2, fault="bad_checkpoint", fault_step=4)
    assert damaged.run() == -signal.SIGKILL
    assert damaged.run() == 0
    assert min(losses(damaged)) == 3
    [withdrawn] = damaged.events(CheckpointWithdrawn)
    assert "4-1 is not used" in withdrawn.message
    assert (damaged.dir / "checkpoints" / "4-1.damaged").is_dir()
    assert [event.data["dir"] for event in damaged.events(CheckpointEvent)] == ["4-2", "6-2"]


def test_a_hang_ignores_everything_but_sigkill(job):
    hanging = job(steps=5, fault="hang", fault_step=1)
    process = hanging.start()

    def stopped():
        with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] == "T"

    until(stopped)
    process.terminate()
    assert stopped()
    assert process.poll() is None
    process.kill()
    assert process.wait(120) == -signal.SIGKILL


def test_an_unreadable_row_fails_the_job(job):
    broken = job()
    with (broken.dir / "train.jsonl").open("a") as data:
        data.write("{nope\n")
    assert broken.run() == 1
    error = broken.events(ErrorEvent)[0]
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "line 13" in error.message


@pytest.mark.parametrize("rows", [0])
def test_an_empty_file_fails_the_job(job, rows):
    empty = job(rows=rows)
    assert empty.run() == 1
    assert empty.events(ErrorEvent)[0].code == "invalid_training_file"
