"""A job on two devices, from the request to the model: a server, torchrun, TRL, and arbor replay."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import supervisor_of
from live import LiveServer
from waiting import until

from arbor_core.testing import device
from arbor_core.testing.sockets import beyond_loopback, descendants, listening

pytest.importorskip("trl")
pytestmark = [pytest.mark.ml, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.skipif(device().kind == "cuda", reason="one GPU, and NCCL wants one for each rank")
def test_a_job_on_two_devices(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    tiny = tmp_path / "models" / "tiny"
    subprocess.run([sys.executable, "-m", "arbor_core", "tiny-model", str(tiny)], check=True, capture_output=True)
    server = start_server(
        "+trainer=sft", "gpu.train=[0,1]", "launcher=torchrun", f"models.dirs=[{tiny.parent}]", mock=False
    )
    settings = {"n_epochs": 4, "batch_size": 4, "learning_rate": 3e-3}
    job = server.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=server.upload(chat_rows),
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": settings}},
        extra_body={"num_gpus": 2},
    )
    server.wait(job.id, "running", seconds=120)
    events = server.storage / "jobs" / job.id / "attempts" / "1" / "events.jsonl"
    until(lambda: events.exists() and '"metrics"' in events.read_text(), seconds=300)
    processes = descendants(supervisor_of(server, job.id))
    found = {pid: listening(pid) for pid in processes}
    assert len(processes) >= 4 and any(found.values()), f"they train together: {found}"
    assert not beyond_loopback(one for addresses in found.values() for one in addresses), found
    ended = server.wait(job.id, seconds=300)
    assert ended.status == "succeeded", ended.error
    assert server.stop() == 0
    command = [sys.executable, "-m", "arbor_core", "replay", job.id, "--storage", str(server.storage)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "12 steps repeated: all losses are equal and the digests of the parameters after 12 of them" in ran.stdout
