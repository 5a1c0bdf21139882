"""The invariants find whatever is left over."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from arbor_core.process.wakeup import short_address
from arbor_core.storage.database import Store
from arbor_core.testing.invariants import check_nothing_left

JOB = "jobs/ftjob-1"


@pytest.mark.parametrize(
    "name",
    [
        f"{JOB}/.job.json.7.tmp",
        f"{JOB}/attempts/1/.exit.json.7.tmp",
        f"{JOB}/attempts/1/work",
        f"{JOB}/checkpoints/2-1.tmp",
        f"{JOB}/checkpoints/named/.best.7.tmp",
        f"{JOB}/inbox/bell",
        "files/.incoming/0f.tmp",
        "engines/1/.ready.json.7.tmp",
        "run/fork-server-7-1.sock",
        "jobs/ftjob-2",
    ],
)
def test_what_is_left_over_is_found(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "arbor.db")
    sql = (
        "INSERT INTO jobs(id,owner,status,created_at,training_file,spec,hyperparameters)"
        " VALUES('ftjob-1','me','cancelled',0,'','{}','{}')"
    )
    store.write_now(sql)
    store.close()
    (tmp_path / JOB / "attempts" / "1").mkdir(parents=True)
    check_nothing_left(tmp_path)
    left = tmp_path / name
    left.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith((".sock", "bell")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one, short_address(left) as address:
            one.bind(address)
    else:
        left.mkdir()
    with pytest.raises(AssertionError, match=left.name):
        check_nothing_left(tmp_path)
