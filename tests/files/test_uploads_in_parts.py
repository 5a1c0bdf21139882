"""/v1/uploads against a real server. The ids `row-N` are rows of the table of bad inputs."""

from __future__ import annotations

import asyncio
import hashlib
import io
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from crash import UPLOAD_POINTS, UPLOAD_POINTS_ALWAYS, marked
from http_calls import MULTIPART, Answer, call, form, raw_socket, settled
from live import LiveServer, launch
from omegaconf import OmegaConf
from waiting import until

from arbor_core.config.compose import core_config_dir
from arbor_core.config.convert import typed
from arbor_core.config.settings import LimitsConfig
from arbor_core.files import concat
from arbor_core.files.repository import Files
from arbor_core.files.uploads import Uploads
from arbor_core.storage.database import Store
from arbor_core.testing.invariants import check_invariants
from arbor_core.types import ApiError

UPLOADS = "/v1/uploads"
BODY: dict[str, Any] = {"bytes": 6, "filename": "rows.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}


def begin(server: LiveServer, size: int = 6, **fields: Any) -> str:
    answer = call(server.url, "POST", UPLOADS, {**BODY, "bytes": size, **fields})
    assert answer.status == 200, answer.body
    return str(answer.json["id"])


def send(server: LiveServer, upload: str, content: bytes) -> Answer:
    return call(server.url, "POST", f"{UPLOADS}/{upload}/parts", form(("data", content, "upload")), MULTIPART)


def complete(server: LiveServer, upload: str, *parts: str, **fields: Any) -> Answer:
    return call(server.url, "POST", f"{UPLOADS}/{upload}/complete", {"part_ids": parts, **fields})


def in_parts(server: LiveServer, *contents: bytes, **fields: Any) -> tuple[str, list[str]]:
    """A pending upload that has all its parts."""
    upload = begin(server, len(b"".join(contents)), **fields)
    return upload, [send(server, upload, content).json["id"] for content in contents]


def kept(server: LiveServer) -> set[str]:
    """Parts on the disk."""
    return {path.name for path in (server.storage / "files" / ".parts").iterdir()}


def test_the_client_sends_a_large_file(server: LiveServer, tmp_path: Path) -> None:
    content = bytes(range(256)) * (3 << 12)  # 3 MB
    path = tmp_path / "großé.jsonl"
    path.write_bytes(content)
    before = kept(server)
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    upload = server.client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1_000_000, md5=md5
    )
    assert (upload.status, upload.object, upload.bytes) == ("completed", "upload", len(content))
    assert upload.expires_at == upload.created_at + 3600
    assert upload.file is not None
    assert server.client.files.retrieve(upload.file.id) == upload.file
    assert upload.file.filename == upload.filename == "großé.jsonl"
    assert server.client.files.content(upload.file.id).read() == content
    assert kept(server) == before


def test_one_part_may_be_64_mb_and_no_byte_more(server: LiveServer) -> None:
    content = bytes(64 << 20)
    upload = server.client.uploads.upload_file_chunked(
        file=content, filename="zeros", bytes=len(content), mime_type="text/plain", purpose="user_data"
    )
    assert upload.file is not None
    assert upload.file.bytes == len(content)
    server.client.files.delete(upload.file.id)
    left = server.client.uploads.create(**{**BODY, "bytes": 1 << 30})
    before = kept(server)
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.uploads.parts.create(left.id, data=io.BytesIO(content + b"x"))
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")
    assert kept(server) == before
    assert server.client.uploads.cancel(left.id).status == "cancelled"


def test_the_file_expires_as_was_asked(server: LiveServer) -> None:
    upload = begin(server, 2, expires_after={"anchor": "created_at", "seconds": 3600})
    part = send(server, upload, b"{}").json["id"]
    file = complete(server, upload, part).json["file"]
    assert file["expires_at"] == file["created_at"] + 3600


def test_a_part_may_be_a_text_field(server: LiveServer) -> None:
    upload = begin(server, 2)
    body = form(("data", b"{}"))
    part = call(server.url, "POST", f"{UPLOADS}/{upload}/parts", body, MULTIPART).json
    assert (part["object"], part["upload_id"]) == ("upload.part", upload)
    assert complete(server, upload, part["id"]).json["status"] == "completed"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"bytes": 0}, 400, "integer_below_min_value", "bytes"),
        ({"bytes": "6"}, 400, "invalid_type", "bytes"),
        ({"bytes": 1 << 40}, 413, "file_too_large", "bytes"),
        ({"purpose": "world domination"}, 400, "invalid_value", "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, 400, "integer_below_min_value", None),
        ({"filename": None}, 400, "invalid_type", "filename"),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
    ],
)
def test_uploads_that_cannot_be(
    server: LiveServer, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = call(server.url, "POST", UPLOADS, {**BODY, **fields})
    answer.error(status, code, param or "expires_after.seconds")


@pytest.mark.parametrize(
    ("parts", "code", "param"),
    [
        ([("data", b"", "upload")], "empty_file", "data"),
        ([], "missing_required_parameter", "data"),
        ([("data", b"1", "a"), ("data", b"2", "b")], "duplicate_parameter", "data"),
        ([("data", b"1", "a"), ("colour", b"red")], "unknown_parameter", "colour"),
    ],
)
def test_parts_that_cannot_be(server: LiveServer, parts: list[Any], code: str, param: str) -> None:
    upload, before = begin(server), kept(server)
    answer = call(server.url, "POST", f"{UPLOADS}/{upload}/parts", form(*parts), MULTIPART)
    answer.error(400, code, param)
    assert kept(server) == before


@pytest.mark.parametrize("end", [pytest.param(word, id=f"row-30-{word}") for word in ("complete", "cancel")])
def test_nothing_can_be_done_to_an_upload_that_is_over(server: LiveServer, end: str) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    over = complete(server, upload, *parts) if end == "complete" else cancel(server, upload)
    assert over.status == 200, over.body
    before = kept(server)
    assert not before & set(parts)
    send(server, upload, b"more").error(400, "upload_not_pending", "upload_id")
    complete(server, upload, *parts[::-1]).error(400, "upload_not_pending", "upload_id")
    if end == "complete":
        cancel(server, upload).error(400, "upload_not_pending", "upload_id")
        assert server.client.files.content(over.json["file"]["id"]).read() == b"abcdef"
    else:
        assert cancel(server, upload).json == over.json, "what was cancelled before stays so"
    assert kept(server) == before


def cancel(server: LiveServer, upload: str) -> Answer:
    return call(server.url, "POST", f"{UPLOADS}/{upload}/cancel")


def test_row_30_an_upload_that_has_expired(start_server: Callable[..., LiveServer]) -> None:
    server = start_server("limits.upload_seconds=1")
    upload, parts = in_parts(server, b"abc", b"def")
    assert len(parts) == 2
    until(lambda: not kept(server))  # nobody asks: the server sees to it
    for answer in (send(server, upload, b"x"), complete(server, upload, *parts), cancel(server, upload)):
        assert "is expired" in answer.error(400, "upload_not_pending", "upload_id")["message"]


@pytest.mark.parametrize(
    ("order", "code"),
    [
        pytest.param([0, "part_none"], "invalid_part_ids", id="row-31-unknown"),
        pytest.param([0, "x" * 5000], "invalid_part_ids", id="row-31-long"),
        pytest.param([0, 0], "invalid_part_ids", id="row-31-twice"),
        pytest.param([0], "upload_size_mismatch", id="row-32-too-few"),
        pytest.param([], "upload_size_mismatch", id="row-32-none"),
    ],
)
def test_parts_that_are_not_the_file(server: LiveServer, order: list[Any], code: str) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    chosen = [parts[place] if isinstance(place, int) else place for place in order]
    complete(server, upload, *chosen).error(400, code, "part_ids")
    assert set(parts) <= kept(server), "the parts stay"
    assert complete(server, upload, *parts).status == 200


def test_row_31_a_part_of_another_upload(server: LiveServer) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    _, others = in_parts(server, b"abc", b"def")
    complete(server, upload, parts[0], others[1]).error(400, "invalid_part_ids", "part_ids")


def test_row_31_the_order_given_is_the_files(server: LiveServer) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    file = complete(server, upload, *parts[::-1]).json["file"]
    assert server.client.files.content(file["id"]).read() == b"defabc"


def test_a_part_that_was_sent_twice_may_be_left_out(server: LiveServer) -> None:
    upload = begin(server, 3)
    first, second = (send(server, upload, b"abc").json["id"] for _ in range(2))
    assert complete(server, upload, second).status == 200
    assert not {first, second} & kept(server)


def test_row_32_another_md5(server: LiveServer) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    complete(server, upload, *parts, md5="0" * 32).error(400, "md5_mismatch", "md5")
    assert settled(server), "the parts stay"
    md5 = hashlib.md5(b"abcdef", usedforsecurity=False).hexdigest().upper()
    assert complete(server, upload, *parts, md5=md5).json["status"] == "completed"


def test_row_33_completing_twice(server: LiveServer) -> None:
    upload, parts = in_parts(server, b"abc", b"def", purpose="batch")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: complete(server, upload, *parts), range(4)))
    answers.append(complete(server, upload, *parts))
    assert [answer.status for answer in answers] == [200] * 5
    assert all(answer.json == answers[0].json for answer in answers)
    assert len(server.client.files.list(purpose="batch").data) == 1, "no second file was left on the list"
    deleted = server.client.files.delete(answers[0].json["file"]["id"])
    assert deleted.deleted
    assert "file" not in complete(server, upload, *parts).json


def test_row_34_completing_while_a_part_comes_in(server: LiveServer) -> None:
    upload, parts = in_parts(server, b"abc", b"def")
    body = form(("data", b"more", "upload"))
    with raw_socket(server.url) as connection:
        head = f"POST {UPLOADS}/{upload}/parts HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(f"{head}content-type: {MULTIPART['content-type']}\r\n\r\n".encode() + body[:-12])
        incoming = server.storage / "files" / ".incoming"
        until(lambda: any(incoming.iterdir()))
        file = complete(server, upload, *parts).json["file"]
        connection.sendall(body[-12:])
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400")
    assert b'"code":"upload_not_pending"' in answer
    settled(server)
    assert server.client.files.content(file["id"]).read() == b"abcdef"
    assert not kept(server) & set(parts)


TENANTS = {"a": "train", "b": "train", "c": "infer"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with two tenants, and a key for inference alone."""
    keys = [f"{{name: {who}, key: sk-{who}, tenant: {who}, scopes: [{scope}]}}" for who, scope in TENANTS.items()]
    live = launch(tmp_path_factory.mktemp("guarded"), f"auth.keys=[{', '.join(keys)}]")
    yield live
    live.stop()


def test_row_37_another_tenants_upload(guarded: LiveServer) -> None:
    def ask(key: str, path: str, body: Any = None) -> Answer:
        return call(guarded.url, "POST", path, body, {"authorization": f"Bearer {key}"})

    upload = ask("sk-a", UPLOADS, BODY).json["id"]
    for key, path, body in (
        ("sk-b", f"{UPLOADS}/{upload}/complete", {"part_ids": []}),
        ("sk-b", f"{UPLOADS}/{upload}/cancel", None),
        ("sk-b", f"{UPLOADS}/{upload}/parts", None),
        ("sk-a", f"{UPLOADS}/upload_none/cancel", None),
    ):
        ask(key, path, body).error(404, "upload_not_found", "upload_id")
    ask("sk-c", UPLOADS, BODY).error(403, "insufficient_permissions")
    assert ask("sk-a", f"{UPLOADS}/{upload}/cancel").json["status"] == "cancelled"


def test_row_24_no_room_for_an_upload(start_server: Callable[..., LiveServer]) -> None:
    server = start_server(f"limits.free_bytes={1 << 60}")
    call(server.url, "POST", UPLOADS, BODY).error(507, "insufficient_storage")


@pytest.mark.parametrize("point", marked(UPLOAD_POINTS_ALWAYS, UPLOAD_POINTS))
def test_a_server_that_is_killed_leaves_the_parts_or_the_file(
    point: str, start_server: Callable[..., LiveServer]
) -> None:
    """Whatever was answered is still true, and the client that goes on where it was gets its file."""
    server = start_server(env={"ARBOR_CRASH_AT": point})
    upload, parts = "", []
    with suppress(OSError, IndexError):  # it dies on the way
        upload = begin(server)
        parts = [send(server, upload, content).json["id"] for content in (b"abc", b"def")]
        complete(server, upload, *parts)
    assert server.process.wait(120) == -signal.SIGKILL, f"the server never came to {point}"
    again = start_server()
    assert not list((again.storage / "files" / ".incoming").iterdir())
    assert set(parts) >= kept(again) or len(parts) < 2
    upload = upload or begin(again)
    for content in (b"abc", b"def")[len(parts) :]:
        parts.append(send(again, upload, content).json["id"])
    done = complete(again, upload, *parts)
    assert done.status == 200, done.body
    assert again.client.files.content(done.json["file"]["id"]).read() == b"abcdef"
    assert [file.id for file in again.client.files.list()] == [done.json["file"]["id"]]
    assert kept(again) == set()
    assert again.stop() == 0
    check_invariants(again.storage)


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[Uploads]:
    """The uploads of an empty storage directory, without a server."""
    store = Store(tmp_path / "arbor.db")
    limits: Any = OmegaConf.to_container(OmegaConf.load(core_config_dir() / "serve.yaml").limits)
    yield Uploads(Files(store, tmp_path / "files", typed(limits, LimitsConfig, "limits")))
    store.close()


async def added(uploads: Uploads, *contents: bytes) -> tuple[Any, list[str]]:
    upload = await uploads.create("me", "a", len(b"".join(contents)), "fine-tune", None)
    parts = []
    for content in contents:
        async with uploads.incoming() as part:
            await part.write(content)
            parts.append((await uploads.add(upload, part)).id)
    return upload, parts


@pytest.mark.parametrize("end", ["cancel", "expire"])
async def test_an_upload_that_ends_while_it_is_joined(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """Cancelling wins; an end of time does not."""
    upload, parts = await added(uploads, b"abc", b"def")
    loop, joined = asyncio.get_running_loop(), concat.join

    def slow(*args: Any, **options: Any) -> Any:
        found = joined(*args, **options)
        if end == "cancel":
            asyncio.run_coroutine_threadsafe(uploads.cancel(upload), loop).result()
        else:
            change = uploads.store.write(lambda db: db.execute("UPDATE uploads SET expires_at=0"))
            asyncio.run_coroutine_threadsafe(change, loop).result()
            asyncio.run_coroutine_threadsafe(uploads.expire(), loop).result()
        return found

    monkeypatch.setattr("arbor_core.files.uploads.join", slow)
    if end == "cancel":
        with pytest.raises(ApiError, match="is cancelled"):
            await uploads.complete(upload, parts)
    else:
        assert (await uploads.complete(upload, parts)).status == "completed"
    files = [path for path in uploads.files.root.iterdir() if path.is_file()]
    assert len(files) == (end == "expire")
    assert not list(uploads.parts_dir.iterdir())


async def test_a_damaged_part(uploads: Uploads) -> None:
    upload, parts = await added(uploads, b"abc", b"def")
    (uploads.parts_dir / parts[1]).write_bytes(b"d")
    with pytest.raises(ApiError, match="not those that came"):
        await uploads.complete(upload, parts)
    (uploads.parts_dir / parts[1]).unlink()
    with pytest.raises(ApiError, match="not those that came"):
        await uploads.complete(upload, parts)
    assert not list(uploads.files.incoming_dir.iterdir())


async def test_too_many_parts(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arbor_core.files.uploads.MOST_PARTS", 1)
    with pytest.raises(ApiError, match="may have 1 parts"):
        await added(uploads, b"abc", b"def")
    assert len(list(uploads.parts_dir.iterdir())) == 1


def test_joining_without_the_kernels_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [tmp_path / str(number) for number in range(3)]
    for part in parts:
        part.write_bytes(part.name.encode() * 3_000_000)

    def unable(*_: Any) -> int:
        raise OSError(concat.UNABLE[0], "not here")

    helped = concat.join(parts, tmp_path / "helped", md5=True)
    monkeypatch.setattr("os.copy_file_range", unable)
    alone = concat.join(parts, tmp_path / "alone", md5=True)
    assert helped == alone
    assert (tmp_path / "alone").read_bytes() == b"".join(part.read_bytes() for part in parts)
    assert alone.sha256 == hashlib.sha256((tmp_path / "helped").read_bytes()).hexdigest()
