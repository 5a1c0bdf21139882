"""What nobody can reach: the server's own files, its engines, its secrets; and what a model may not bring."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import BASE, JOBS, call, raw_socket
from live import LiveServer, launch

CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


# --- what nobody can reach --------------------------------------------------------------------------------------------


def test_what_is_stored_is_the_operators_alone(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server()
    job = server.client.fine_tuning.jobs.create(model=BASE, training_file=server.upload(chat_rows))
    done = server.wait(job.id)
    assert server.client.chat.completions.create(model=done.fine_tuned_model, messages=ASKED["messages"]).choices  # type: ignore[arg-type]
    found = list(server.storage.rglob("*"))
    for name in ("arbor.db", "lock", "job.json", "events.jsonl", "worker.log", "order.json", "spec.json", "bell"):
        assert any(path.name == name for path in found), f"{name} is not looked at"
    for path in (server.storage, *found):
        with contextlib.suppress(FileNotFoundError):  # a temporary file that was there when it was listed
            assert path.lstat().st_mode & 0o077 == 0, f"{path}: {path.lstat().st_mode:o}"


def test_what_an_earlier_server_left_open_is_closed(start_server: Callable[..., LiveServer], tmp_path: Path) -> None:
    storage = tmp_path / "data"
    for name in ("files", "jobs", "run", "engines"):
        (storage / name).mkdir(parents=True, mode=0o777)
        (storage / name).chmod(0o777)
    (storage / "lock").touch(mode=0o666)
    sqlite3.connect(storage / "arbor.db").close()
    (storage / "arbor.db").touch()
    (storage / "arbor.db").chmod(0o666)
    storage.chmod(0o755)
    start_server()
    for name in ("files", "jobs", "run", "arbor.db", "lock"):
        assert (storage / name).stat().st_mode & 0o077 == 0, name
    assert storage.stat().st_mode & 0o777 == 0o755, "the folder itself may hold other things of the operator's"


PATHS = (
    "/../arbor.db", "/v1/files/../arbor.db", "/v1/files/..%2farbor.db/content", "/v1/files/..%2f..%2farbor.db/content",
    "/v1/files/%2e%2e/content", "/v1/files/.incoming/content", "/v1/files/.incoming", "/v1/files/%00/content",
    "/v1/files/arbor.db/content", "/docs/../../arbor.db", "/docs/docs.html", "/static/docs.html", "/schema/../app.py",
    "/schema/openapi.yaml", "/v1/models/..%2f..%2farbor.db", "/v1/models//etc/ssl/certs",
    "/v1/models/%2fetc%2fssl%2fcerts",
    "/v1/models/../data", "/v1/fine_tuning/jobs/..%2f..%2flock", "/v1/fine_tuning/jobs/%2e%2e/events",
    "/v1/arbor/trainers/..%2f..%2farbor.db/schema", "/v1/arbor/trainers/mock.yaml/schema", "//etc/passwd",
    "/%2e%2e/lock",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_route_leads_to_the_servers_own_files(server: LiveServer, path: str) -> None:
    server.upload([{"a": 1}])
    answer = call(server.url, "GET", path)
    assert answer.status in (400, 404), answer.body
    assert set(answer.json) == {"error"}
    for held in (b"SQLite format", b"root:", b"from litestar", b"<html"):
        assert held not in answer.body


@pytest.mark.parametrize("id", ["%00", "..", "a%2Fb", "x" * 10_000, "%F0%9F%92%A9", "file-%27%20OR%201=1--", "%0d%0a"])
def test_row_45_ids_that_are_none(server: LiveServer, id: str) -> None:
    for path in ("/v1/files/{}", "/v1/files/{}/content", JOBS + "/{}", JOBS + "/{}/events", JOBS + "/{}/checkpoints"):
        answer = call(server.url, "GET", path.format(id))
        assert answer.status == 404, answer.body
        assert len(answer.body) < 1000
    for path in ("/v1/files", JOBS):
        call(server.url, "GET", f"{path}?after={id}").error(400, "invalid_cursor", "after")


def test_ids_are_random(server: LiveServer) -> None:
    made = [server.upload(b"{}", purpose="user_data") for _ in range(20)]
    assert len({name.removeprefix("file-")[:6] for name in made}) == 20
    assert all(re.fullmatch(r"file-[A-Za-z0-9]{24}", name) for name in made)


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000 + b"\r\n", (400, 431), id="row-51-headers"),
        pytest.param(b"GET /health HTTP/1.1\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", (400, 431), id="row-51-header"),
        pytest.param(b"GET /" + b"y" * 200_000 + b" HTTP/1.1\r\n\r\n", (400, 414, 431), id="row-51-url"),
        pytest.param(b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", (200, 400), id="row-51-hosts"),
        pytest.param(
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\nabcde",
            (400,),
            id="row-51-lengths",
        ),
        pytest.param(
            b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
            (400, 501),
            id="row-51-encoding",
        ),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", (400,), id="row-51-tls"),
        pytest.param(b"GET /hea lth HTTP/1.1\r\nhost: localhost\r\n\r\n", (400,), id="row-51-space"),
    ],
)
def test_row_51_requests_that_are_none(server: LiveServer, raw: bytes, status: tuple[int, ...]) -> None:
    answer = spoken(server, raw)
    assert re.match(rb"HTTP/1.1 \d{3} ", answer), answer[:200]
    assert int(answer.split()[1]) in status
    assert call(server.url, "GET", "/health").status == 200


def spoken(server: LiveServer, raw: bytes) -> bytes:
    """What comes back for these bytes, until the server closes or says nothing more."""
    with raw_socket(server.url) as connection, contextlib.suppress(ConnectionError, TimeoutError):
        answer = b""
        with contextlib.suppress(ConnectionError):  # the refusal may come before all is sent
            connection.sendall(raw)
        connection.settimeout(60)
        while piece := connection.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer:
                break
    return answer


def test_row_51_no_request_hides_in_another(server: LiveServer) -> None:
    """Both a length and chunks: either it is refused, or the chunks count and the rest is not a second request."""
    hidden = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\ncontent-length: "
    chunk = f"{len(hidden):x}\r\n".encode() + hidden + b"\r\n0\r\n\r\n"
    answer = spoken(server, head + b"6\r\n\r\n" + chunk)
    assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
    assert b'"object":"list"' not in answer


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_an_engine_demands_a_token_that_only_the_server_has(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]
) -> None:
    server = start_server("auth.keys=[the-operators-key]")
    client = server.new_client("the-operators-key")
    assert client.chat.completions.create(**ASKED).choices
    ready = next((server.storage / "engines").glob("*/ready.json"))
    url = json.loads(ready.read_bytes())["url"]
    process = next(
        path for path in Path("/proc").glob("[0-9]*") if str(ready.parent).encode() in read(path / "cmdline")
    )
    assert (process / "cwd").readlink() == ready.parent, "a hub id is not looked up beside whoever started the server"
    assert url.startswith("http://127.0.0.1:")
    for headers in ({}, {"authorization": "Bearer the-operators-key"}, {"authorization": "Bearer "}):
        for method, path, body in [
            ("POST", CHAT, ASKED),
            ("POST", "/v1/completions", {"model": BASE, "prompt": "x"}),
            ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "/etc"}),
            ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}),
            ("GET", "/v1/models", None),
        ]:
            assert call(url, method, path, body, headers).status == 401, path
    token = json.loads((ready.parent / "spec.json").read_bytes())["token"]
    assert call(url, "POST", CHAT, ASKED, {"authorization": f"Bearer {token}"}).status == 200
    assert call(server.url, "GET", "/v1/files", headers={"authorization": f"Bearer {token}"}).status == 401


def test_no_key_is_written_anywhere(start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]]) -> None:
    """Neither the server's keys, nor those that clients try, nor the environment's: not in a log, file or process."""
    server = start_server(
        "auth.keys=['${oc.env:OPERATORS}',{name:n,key:'${oc.env:SECOND}',scopes:[train,infer],tenant:default}]",
        env={"OPERATORS": "secret-of-the-operator", "SECOND": "secret-number-two", "OPENAI_API_KEY": "secret-elsewhere",
             "ARBOR_API_KEY": "secret-of-arbor"},
    )  # fmt: skip
    client = server.new_client("secret-number-two")
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=server.upload(chat_rows), extra_headers={"Idempotency-Key": "k"},
        hyperparameters={"step_seconds": 0.05, "n_epochs": 4},  # type: ignore[typeddict-unknown-key]
    )  # fmt: skip
    assert client.chat.completions.create(**ASKED).choices
    for name in ("secret-that-is-wrong", "secret-of-the-operator"):
        headers = {"authorization": f"Bearer {name}"}
        for path in ("/v1/files", "/v1/nope", "/v1/models/x"):
            call(server.url, "GET", path, headers=headers)
        call(server.url, "POST", JOBS, b"{", headers)
    server.wait(job.id, "running", "succeeded")
    others = [path for path in Path("/proc").glob("[0-9]*") if str(server.storage).encode() in read(path / "cmdline")]
    assert any(b"spec.json" in read(path / "cmdline") for path in others), "the engine is looked at"
    for path in others:
        if path.name != str(server.process.pid):
            assert b"secret" not in read(path / "environ") + read(path / "cmdline"), read(path / "cmdline")
    server.wait(job.id)
    server.stop()
    assert "secret" not in server.log
    written = [path for path in server.storage.rglob("*") if path.is_file()]
    assert len(written) > 10
    for path in written:
        assert b"secret" not in path.read_bytes(), path


def read(path: Path) -> bytes:
    """A file of a process, which may be gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_misspelled_command_line_does_not_show_the_key() -> None:
    command = [sys.executable, "-m", "arbor_core", "serve", "auth.keys=[secret-one"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "auth.keys" in done.stderr
    assert "secret" not in done.stderr


# --- models are data --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, str]]:
    """A server with folders of models that it must not use, and a file to train on."""
    root = tmp_path_factory.mktemp("folders")
    for folder, weights, config_json, tokenizer in [
        ("sound", "model.safetensors", "{}", "{}"),
        ("pickled", "pytorch_model.bin", "{}", "{}"),
        ("coded", "model.safetensors", '{"auto_map": {"AutoModel": "code.Model"}}', "{}"),
        ("coded-tokenizer", "model.safetensors", "{}", '{"auto_map": {"AutoTokenizer": ["code.T", null]}}'),
        ("damaged", "model.safetensors", "{", "{}"),
    ]:
        (root / "models" / folder).mkdir(parents=True)
        (root / "models" / folder / weights).touch()
        (root / "models" / folder / "config.json").write_text(config_json)
        (root / "models" / folder / "tokenizer_config.json").write_text(tokenizer)
    live = launch(root / "server", f"models.dirs=[{root / 'models'}]", "models.allow=[]")
    file = live.upload(b"{}")
    assert call(live.url, "POST", JOBS, {"model": "sound", "training_file": file}).status == 200
    yield live, file
    live.stop()


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [
        pytest.param("pickled", 404, "model_not_found", id="pytorch_model.bin"),
        pytest.param("coded", 400, "invalid_model", id="row-53-auto_map"),
        pytest.param("coded-tokenizer", 400, "invalid_model", id="row-53-auto_map-of-the-tokenizer"),
        pytest.param("damaged", 400, "invalid_model", id="config.json"),
        pytest.param("../sound", 400, "invalid_model", id="row-53-traversal"),
        pytest.param("https://example.com/model", 400, "invalid_model", id="row-53-url"),
    ],
)
def test_row_53_models_that_are_refused(folders: tuple[LiveServer, str], name: str, status: int, code: str) -> None:
    server, file = folders
    call(server.url, "POST", JOBS, {"model": name, "training_file": file}).error(status, code, "model")
    call(server.url, "POST", CHAT, {**ASKED, "model": name}).error(status, code, "model")


def test_no_code_trusts_a_models_code() -> None:
    """Neither the core nor a plugin of ours can be told to."""
    root = Path(__file__).parents[2]
    found = [path for folder in ("arbor_core", "plugins") for path in (root / folder).rglob("*.py")]
    sources = [path for path in found if "tests" not in path.parts]
    assert len(sources) > 60
    for path in sources:
        for match in re.finditer(r"trust_remote_code\s*[=:]\s*(\w+)", path.read_text()):
            assert match[1] == "False", path
        assert not re.search(r"\b(pickle\.loads?|torch\.load|use_safetensors=False)\b", path.read_text()), path
