"""/v1/files against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import FILE, PURPOSE, call, form, post, raw_socket, settled
from live import LiveServer
from omegaconf import OmegaConf
from waiting import until

from arbor_core.config.compose import core_config_dir
from arbor_core.config.convert import typed
from arbor_core.config.settings import LimitsConfig
from arbor_core.files.repository import Files
from arbor_core.jobs.records import JobSpec, NewJob
from arbor_core.jobs.repository import Jobs
from arbor_core.storage.database import Store
from arbor_core.types import ApiError


def test_a_file_comes_back_as_it_went(server: LiveServer) -> None:
    content = bytes(range(256)) * 20_000
    before = int(time.time())
    file = server.client.files.create(file=("data.bin", content), purpose="fine-tune")
    assert re.fullmatch(r"file-[A-Za-z0-9]{24}", file.id)
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(content), "data.bin", "fine-tune")
    assert file.status == "processed"
    assert before <= file.created_at <= time.time()
    assert file.expires_at is None
    assert server.client.files.retrieve(file.id) == file
    assert server.client.files.wait_for_processing(file.id) == file
    assert server.client.files.content(file.id).read() == content
    deleted = server.client.files.delete(file.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)
    assert not (server.storage / "files" / file.id).exists()


def test_a_file_may_come_before_its_purpose(server: LiveServer) -> None:
    answer = post(server, FILE, PURPOSE)
    assert answer.status == 200
    assert answer.json["bytes"] == 3


def test_expiry(server: LiveServer) -> None:
    file = server.client.files.create(
        file=("a.jsonl", b"{}"), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600


def test_lists_page_both_ways(server: LiveServer) -> None:
    ids = [server.upload(b"{}", purpose="user_data") for _ in range(5)]
    newest_first = [file.id for file in server.client.files.list(purpose="user_data", limit=2)]
    assert newest_first[:5] == ids[::-1]
    oldest_first = [file.id for file in server.client.files.list(purpose="user_data", limit=2, order="asc")]
    assert oldest_first[-5:] == ids
    page = server.client.files.list(purpose="user_data", limit=2)
    assert (page.object, page.has_more, page.first_id, page.last_id) == ("list", True, ids[4], ids[3])
    server.client.files.delete(ids[3])
    after = server.client.files.list(purpose="user_data", after=ids[3])
    assert [file.id for file in after.data][:3] == ids[2::-1], "a deleted file is still a place in the list"
    empty = call(server.url, "GET", "/v1/files?purpose=batch").json
    assert empty == {"data": [], "first_id": None, "last_id": None, "has_more": False, "object": "list"}


@pytest.mark.parametrize(
    "content",
    [pytest.param(b'\xef\xbb\xbf{"a": 1}\r\n\r\n\n{"b": 2}', id="row-4"), pytest.param(b"\xff\xfe\x00", id="row-5")],
)
def test_bytes_are_kept_as_they_are(server: LiveServer, content: bytes) -> None:
    assert server.client.files.content(server.upload(content)).read() == content


def test_row_22_a_server_that_is_killed_while_it_takes_an_upload(start_server: Callable[..., LiveServer]) -> None:
    server = start_server()
    kept = server.upload(b"{}\n")
    incoming = server.storage / "files" / ".incoming"
    chunk = form(PURPOSE, ("file", b"x" * (3 << 20), "rows.jsonl"))[:-12]
    with raw_socket(server.url) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n"
            b"content-type: multipart/form-data; boundary=XX\r\n\r\n" + f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"
        )
        until(lambda: any(part.stat().st_size for part in incoming.iterdir()))
        server.stop(signal.SIGKILL)
    assert [part.suffix for part in incoming.iterdir()] == [".tmp"]
    again = start_server()
    assert list(incoming.iterdir()) == []
    assert [file.id for file in again.client.files.list()] == [kept]
    assert again.client.files.content(kept).read() == b"{}\n"


def test_row_24_a_disk_that_is_full(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(f"limits.free_bytes={1 << 60}")
    answer = post(server, PURPOSE, FILE)
    answer.error(507, "insufficient_storage")
    assert answer.headers["x-should-retry"] == "false"
    assert settled(server) == set()


@pytest.mark.parametrize(
    ("content", "status", "code", "param"),
    [
        pytest.param(b'{"z": 1}', 500, "file_corrupted", None, id="row-25-other-bytes"),
        pytest.param(b"", 500, "file_corrupted", None, id="row-25-truncated"),
        pytest.param(None, 404, "file_not_found", "id", id="row-25-missing"),
    ],
)
def test_a_damaged_file(server: LiveServer, content: bytes | None, status: int, code: str, param: str | None) -> None:
    original = b'{"a": 1}'
    file_id = server.upload(original)
    path = server.storage / "files" / file_id
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(original).digest()
    path.unlink() if content is None else path.write_bytes(content)
    answer = call(server.url, "GET", f"/v1/files/{file_id}/content")
    answer.error(status, code, param)
    if status == 500:
        assert answer.headers["x-should-retry"] == "false"
    assert server.client.files.retrieve(file_id).status == "error"


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """The files of an empty storage directory, without a server."""
    store = Store(tmp_path / "arbor.db")
    limits = OmegaConf.to_container(OmegaConf.load(core_config_dir() / "serve.yaml").limits)
    limits = typed(limits, LimitsConfig, "limits")
    yield Files(store, tmp_path / "files", limits)
    store.close()


async def test_row_23_bytes_without_a_row_are_swept_later(files: Files) -> None:
    kept, insert = await files.add_pieces("me", "kept", [b"1"], "fine-tune")
    await files.store.write(insert)
    young, old = files.path("file-young"), files.path("file-old")
    for path in (young, old):
        path.write_bytes(b"2")
    for path in (old, files.path(kept)):
        os.utime(path, (0, 0))
    files.sweep()
    assert {path.name for path in files.root.iterdir()} == {".incoming", kept, "file-young"}


async def test_row_29_a_file_expires_only_when_no_job_needs_it(files: Files) -> None:
    async with files.incoming() as part:
        await part.write(b"{}")
        file = await files.commit(part, "me", "a", "fine-tune", lifetime=3600)
    await files.store.write(lambda db: db.execute("UPDATE files SET expires_at=1"))
    spec = JobSpec(trainer="t", method="supervised", config={}, model="m", model_path="m", seed=1)
    jobs = Jobs(files.store)
    job = await jobs.create(NewJob("me", file.id, None, None, {}, spec))
    await files.expire()
    assert files.get(file.id, "me") is not None
    assert files.path(file.id).exists()
    await jobs.transition(job, "cancelled")
    assert files.get(file.id, "me") is None
    await files.expire()
    assert not files.path(file.id).exists()


async def add_expired(files: Files, owner: str) -> str:
    file_id, insert = await files.add_pieces(owner, "old", [b"1"], "fine-tune")
    await files.store.write(insert)
    await files.store.write(lambda db: db.execute("UPDATE files SET expires_at=1 WHERE id=?", (file_id,)))
    return file_id


async def test_row_29_expiry_is_nobodys_fault(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    old = [await add_expired(files, owner) for owner in ("me", "you")]
    await asyncio.gather(*(files.expire() for _ in range(3)))
    assert not any(files.path(file_id).exists() for file_id in old)
    old = [await add_expired(files, "you")]
    files.path(old[0]).unlink()
    files.path(old[0]).mkdir()  # no file that could be unlinked
    await files.expire()
    assert files.page("you", 10) == []
    assert "were not removed" in caplog.text


async def test_row_29_a_job_may_be_faster_than_expiry(files: Files) -> None:
    old, jobs, go = await add_expired(files, "you"), Jobs(files.store), threading.Event()
    spec = JobSpec(trainer="t", method="supervised", config={}, model="m", model_path="m", seed=1)
    held = asyncio.create_task(files.store.write(lambda _: go.wait(120)))
    creating = asyncio.create_task(jobs.create(NewJob("you", old, None, None, {}, spec)))
    expiring = asyncio.create_task(files.expire())
    await asyncio.sleep(0)  # all three wait for the writer, in this order
    go.set()
    await asyncio.gather(held, creating, expiring)
    assert files.get(old, "you") is not None
    assert files.path(old).exists()


async def half_an_upload(files: Files, error: Exception) -> None:
    async with files.incoming() as part:
        await part.write(b"x" * (3 << 20))
        raise error


async def test_an_upload_that_fails_leaves_nothing(files: Files) -> None:
    with pytest.raises(RuntimeError, match="on the way"):
        await half_an_upload(files, RuntimeError("on the way"))
    assert [path for path in files.root.rglob("*") if path.is_file()] == []


async def test_row_24_a_disk_that_fills_up(files: Files) -> None:
    with pytest.raises(ApiError, match="disk space") as caught:
        await half_an_upload(files, OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.status == 507


def test_row_26_a_file_that_a_job_needs(server: LiveServer, chat_rows: list[dict[str, Any]]) -> None:
    file = server.upload(chat_rows)
    job = server.client.fine_tuning.jobs.create(
        model="mock/tiny",
        training_file=file,
        method={"type": "supervised", "supervised": {"hyperparameters": {"steps": 100_000, "step_seconds": 0.05}}},  # type: ignore[typeddict-unknown-key]
    )
    call(server.url, "DELETE", f"/v1/files/{file}").error(400, "file_in_use")
    assert server.client.files.retrieve(file).id == file
    server.client.fine_tuning.jobs.cancel(job.id)
    server.wait(job.id, "cancelled")
    assert server.client.files.delete(file).deleted


def test_row_27_deleting_twice(server: LiveServer) -> None:
    file_id = server.upload(b"{}")
    server.client.files.delete(file_id)
    call(server.url, "DELETE", f"/v1/files/{file_id}").error(404, "file_not_found", "id")
    call(server.url, "GET", f"/v1/files/{file_id}").error(404, "file_not_found", "id")
    call(server.url, "GET", f"/v1/files/{file_id}/content").error(404, "file_not_found", "id")
