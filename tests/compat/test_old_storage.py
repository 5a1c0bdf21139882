"""Storage directories that an older server has left, moved to another place: nothing in them may be lost.

README.md says what is in them. Only the server's process, its routes and the command `arbor` are used here, so that
whatever is inside may change. `ARBOR_COMPAT_AT=/tmp/arbor-compat` unpacks them where they were written, for servers
that know absolute paths only.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compat.calls import (
    ARCHIVE,
    CUT,
    EXPECTED,
    GRPO,
    JOBS,
    TEXT,
    answer,
    get,
    here,
    learns,
    options,
    post,
    replayed,
    send_part,
    shown,
    standing,
    state,
    steps,
    wait_for,
)
from crash import UPGRADES
from live import LiveServer

SETTLED = ("succeeded", "failed", "cancelled", "paused")
"""States in which nothing happens to a job unless somebody asks for it."""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Where the archive lies unpacked."""
    old = os.environ.get("ARBOR_COMPAT_AT")
    folder = Path(old) if old else tmp_path / "moved"
    folder.mkdir()
    if old:
        (folder / "venv").symlink_to(sys.prefix)  # attempts were told of this interpreter
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    yield folder
    if old:
        shutil.rmtree(folder)


@pytest.fixture
def opened(root: Path, start_server: Callable[..., LiveServer]) -> Iterator[Callable[[str], LiveServer]]:
    """`opened("mock")` starts a server on a storage directory; what a failed test leaves running is cancelled."""
    servers: list[LiveServer] = []

    def start(name: str) -> LiveServer:
        chosen = options(name, root)
        servers.append(start_server(*chosen.pop("overrides"), storage=root / name, **chosen))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.cancel_all()


class Old:
    """What is known of one of the storage directories."""

    def __init__(self, name: str, root: Path) -> None:
        told = json.loads(EXPECTED.read_text())
        self.name, self.known = name, told[name]
        self.jobs: dict[str, Any] = self.known["jobs"]
        self.shown: dict[str, Any] = json.loads((root / name / "shown.json").read_text())
        self.exact = name == "mock" or here() == {key: told["written"].get(key) for key in here()}
        """Whether numbers must be the same here."""

    def check_opened(self, server: LiveServer) -> None:
        """Everything is there, and as it was shown before."""
        assert {file.id for file in server.client.files.list()} >= set(self.known["files"])
        assert {model.id for model in server.client.models.list()} >= set(self.known["models"])
        for name, job in self.jobs.items():
            now, before = shown(server, job["id"]), self.shown[job["id"]]
            if job["state"] in SETTLED:
                assert now == before, name
            assert now["events"][: len(before["events"])] == before["events"], name
            assert [one for one in now["checkpoints"] if one in before["checkpoints"]] == before["checkpoints"], name
            if job["state"] in SETTLED and "grpo" in job and learns(server):
                assert standing(server, job["id"]) == job["grpo"], name

    def check_uploads(self, server: LiveServer) -> None:
        """The old files can be read, and the upload that lacks a part can be completed."""
        assert server.client.files.content(self.known["training_file"]).read().count(b"\n") == 12
        upload, first = self.known["upload"]["upload"], self.known["upload"]["part"]
        parts = [first, send_part(server, upload, TEXT[CUT:])]
        file = post(server, f"/v1/uploads/{upload}/complete", part_ids=parts)["file"]
        assert server.client.files.content(file["id"]).read() == TEXT

    def finish(self, server: LiveServer) -> None:
        """Let every job that has not ended come to its end."""
        for name in ("paused", "grpo_paused"):
            post(server, f"{JOBS}/{self.jobs[name]['id']}/resume")
        self.finish_learner(server)  # it holds a device until it is asked to end
        for name in ("paused", "killed", "queued"):
            server.wait(self.jobs[name]["id"], "succeeded")
        for name, job in self.jobs.items():
            if name != "grpo_queued" and (name != "grpo_paused" or not learns(server)):
                self.check_ended(server, name, job)

    def finish_learner(self, server: LiveServer) -> None:
        """The paused job that learns from rollouts reads what had waited, then a group of old completions."""
        job = self.jobs["grpo_paused"]
        wait_for(lambda: self.has_made(server, job, 4))
        self.check_steps(server, "grpo_paused", job)
        if not learns(server):
            post(server, f"{JOBS}/{job['id']}/cancel")
            return
        rewards = [
            {"completion_id": name, "index": 2, "reward": float(n)} for n, name in enumerate(self.known["unrewarded"])
        ]
        post(server, f"{GRPO}/rewards", job_id=job["id"], group="fifth", rewards=rewards)
        wait_for(lambda: standing(server, job["id"])["groups"]["handled"] == 5)
        assert post(server, f"{GRPO}/terminate", job_id=job["id"])["status"] == "succeeded"
        assert len(self.steps(server, job)) == 5

    def check_ended(self, server: LiveServer, name: str, job: dict[str, Any]) -> None:
        """A job came to the end that it came to at the old server, by the same steps."""
        after = job["after"]
        now = shown(server, job["id"])
        assert now["job"]["status"] == after["state"] or name == "grpo_paused", name
        assert now["job"]["fine_tuned_model"] == after["model"] or name == "grpo_paused", name
        assert [one["fine_tuned_model_checkpoint"] for one in now["checkpoints"]] == after["checkpoints"], name
        self.check_steps(server, name, job)
        if job["state"] in ("succeeded", "failed", "cancelled"):
            assert now == self.shown[job["id"]], name

    def check_steps(self, server: LiveServer, name: str, job: dict[str, Any]) -> None:
        now, wanted = self.steps(server, job), job["after"]["steps"]
        assert now.keys() == wanted.keys(), name
        if self.exact:  # floats, the losses of the mock, are the same but for the last digit of another C library
            assert now == pytest.approx(wanted, rel=1e-9) if type(wanted.get("1")) is float else now == wanted, name

    def check_answers(self, server: LiveServer) -> None:
        """The old results and checkpoints can be chatted with."""
        said = {model: answer(server, model) for model in self.known["answers"]}
        assert said == self.known["answers"] or not self.exact

    def check_reopened(self, server: LiveServer, before: dict[str, Any]) -> None:
        """The next server shows the same."""
        for job in self.jobs.values():
            assert shown(server, job["id"]) == before[job["id"]]

    def has_made(self, server: LiveServer, job: dict[str, Any], count: int) -> bool:
        """Whether a job has made so many steps; it must not fail meanwhile."""
        assert state(server, job["id"]) != "failed", get(server, f"{JOBS}/{job['id']}")["error"]
        return len(self.steps(server, job)) == count

    @staticmethod
    def steps(server: LiveServer, job: dict[str, Any]) -> dict[str, Any]:
        return steps(shown(server, job["id"])["events"])


def ended(old: Old, server: LiveServer) -> dict[str, Any]:
    """End a server whose jobs have all ended; returns what it told of them."""
    told = {job["id"]: shown(server, job["id"]) for job in old.jobs.values()}
    assert server.stop() == 0
    return told


def test_jobs_of_the_mock_trainers(root: Path, opened: Callable[[str], LiveServer]) -> None:
    pytest.importorskip("arbor_mock")
    old, server = Old("mock", root), opened("mock")
    old.check_opened(server)
    old.check_uploads(server)
    old.check_answers(server)
    old.finish(server)
    last = old.jobs["grpo_queued"]["id"]
    wait_for(lambda: state(server, last) == "running")
    post(server, f"{JOBS}/{last}/cancel")
    wait_for(lambda: state(server, last) == "cancelled")
    before = ended(old, server)
    for name in ("succeeded", "grpo_succeeded", "grpo_killed", "killed"):
        assert "all losses are equal" in replayed(old.jobs[name]["id"], root / "mock" / "data")
    again = opened("mock")
    old.check_reopened(again, before)
    old.check_answers(again)


@pytest.mark.ml
@pytest.mark.slow
def test_jobs_of_real_trainers(root: Path, opened: Callable[[str], LiveServer]) -> None:
    for plugin in ("arbor_sft", "arbor_grpo", "arbor_transformers"):
        pytest.importorskip(plugin)
    old, server = Old("real", root), opened("real")
    old.check_opened(server)
    old.check_uploads(server)
    old.finish(server)
    old.check_answers(server)
    made = old.jobs["queued"]["after"]["model"]  # an adapter on what another job has made
    assert get(server, f"/v1/models/{made}")["id"] == made
    assert isinstance(answer(server, made), str)
    before = ended(old, server)
    if old.exact:
        for name, count in (("grpo_succeeded", 3), ("killed", 32)):
            assert f"{count} steps repeated" in replayed(old.jobs[name]["id"], root / "real" / "data")
    again = opened("real")
    old.check_reopened(again, before)
    old.check_answers(again)


@pytest.mark.parametrize("point", UPGRADES)
def test_a_server_that_dies_while_it_brings_a_storage_up_to_date(
    point: str, root: Path, start_server: Callable[..., LiveServer]
) -> None:
    pytest.importorskip("arbor_mock")
    chosen, storage = options("mock", root), root / "mock"
    with pytest.raises(RuntimeError, match="did not start"):
        start_server(*chosen["overrides"], storage=storage, mock=True, env={"ARBOR_CRASH_AT": point})
    old, server = Old("mock", root), start_server(*chosen["overrides"], storage=storage, mock=True)
    old.check_opened(server)
    server.cancel_all()
