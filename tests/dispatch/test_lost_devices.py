"""Devices that are lost while jobs run: set aside until the server starts again. `row_N` as in docs/faults.md."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from http_calls import call, submit, supervised
from jobs import check_and_stop, events, lease_ends, step_events
from live import LiveServer
from waiting import until

from arbor_core import Device, ErrorEvent
from arbor_core.builtin.allocator import find_gpus
from arbor_core.dispatch.outcome import last_word
from arbor_core.jobdir.failure_notes import read_note
from arbor_core.testing import JobDirectory

LOSES = {"steps": 5, "checkpoint_steps": 1, "fault": "lose_gpu", "fault_step": 3}


def health(server: LiveServer) -> str:
    return str(call(server.url, "GET", "/health").json["status"])


def create(server: LiveServer, file: str, devices: int = 1, **hyper: Any) -> str:
    return str(submit(server, file, method=supervised(**hyper), num_gpus=devices).json["id"])


def test_row_105_a_lost_device_is_set_aside_and_its_job_goes_on_with_another(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("gpu.train=[0,1]")
    file = server.upload(chat_rows)
    assert health(server) == "ok"
    job = create(server, file, **LOSES)
    assert server.wait(job).status == "succeeded"
    assert step_events(server, job) == [1, 2, 3, 4, 5]
    [warning] = [event for event in events(server, job) if event.level == "warn"]
    assert warning.data == {"code": "device_lost", "devices": ["mock:0"]}
    assert "lost mock:0 (DeviceLostError: CUDA error: GPU is lost (simulated))" in warning.message
    assert "attempt 2 starts from the checkpoint at step 3" in warning.message
    held = [event.data["devices"] for event in events(server, job) if "job started" in event.message]
    assert held == [["mock:0"], ["mock:1"]]
    assert health(server) == "degraded"
    both = create(server, file, 2, steps=1)
    until(lambda: any("this server has 1" in event.message for event in events(server, both)))
    assert server.wait(create(server, file, steps=1)).status == "succeeded", "it holds nobody back"
    server.stop()
    again = start_server("gpu.train=[0,1]")
    assert again.wait(both).status == "succeeded"
    assert health(again) == "ok"
    check_and_stop(again)


def test_row_105_without_another_device_the_job_waits_and_new_ones_are_taken(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("gpu.train=[0]")
    file = server.upload(chat_rows)
    job = create(server, file, **LOSES)
    until(lambda: any("this server has 0" in event.message for event in events(server, job)))
    other = create(server, file, steps=1)
    assert server.wait(job, "queued").error is None
    server.stop()
    again = start_server("gpu.train=[0]")
    for each in (job, other):
        assert again.wait(each).status == "succeeded"
    check_and_stop(again)


def test_row_105_a_job_that_loses_every_device_fails(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("gpu.train=[0,1,2]", "limits.attempts=2")
    job = create(server, server.upload(chat_rows), steps=5, checkpoint_steps=5, fault="lose_gpu", fault_times=9)
    error = server.wait(job, "failed").error
    assert error.code == "device_lost"
    assert "mock:1" in error.message
    assert lease_ends(server, job) == ["device_lost", "device_lost"]
    check_and_stop(server)


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("RuntimeError('CUDA error: uncorrectable ECC error encountered')", "device_lost"),
        ("OSError('GPU has fallen off the bus')", "device_lost"),
        ("RuntimeError('CUDA error: an illegal memory access was encountered')", "worker_error"),
        ("ValueError('no GPU is lost here')", "worker_error"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_row_105_the_rank_that_lost_its_device_names_it(
    tmp_path: Path, chat_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, raised: str, code: str, rank: int
) -> None:
    """Another rank than the first reports nothing, and leaves word; one that is alone cannot tell which it was."""
    (tmp_path / "unlucky.py").write_text(f"def train(run):\n    raise {raised}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    devices = (Device("GPU-a", "cuda", 0), Device("GPU-b", "cuda", 1))
    job = JobDirectory(tmp_path / "job", "mock", chat_rows, "mock/tiny", devices=devices)
    job.entry = "unlucky:train"
    assert job.attempt() == 1
    word = read_note(job.attempt_dir)
    outcome = last_word(job.files.attempt(job.attempts))
    if code == "device_lost":
        assert word is not None
        assert word.devices == [devices[rank].id]
        assert outcome is not None
        assert outcome.code == code
    else:
        assert word is None
        assert [event.code for event in job.events(ErrorEvent)] == ([code] if rank == 0 else [])


def test_row_105_a_server_starts_without_the_gpu_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML still counts it, and fails when it is asked about it."""

    class NVMLError(Exception):
        pass

    def uuid(index: int) -> str:
        if index == 1:
            raise NVMLError("GPU is lost")
        return f"GPU-{index}"

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 3,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUUID=uuid,
        nvmlDeviceGetMemoryInfo=lambda index: SimpleNamespace(total=7),
    )
    monkeypatch.setitem(sys.modules, "pynvml", cast("Any", nvml))
    assert [(gpu.id, gpu.index) for gpu in find_gpus()] == [("GPU-0", 0), ("GPU-2", 2)]
