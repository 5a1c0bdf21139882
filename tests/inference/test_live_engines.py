"""Engines behind a whole server: who may talk to them, what happens when they hang, and what clients hear of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from http_calls import PATIENCE, Answer, call
from live import LiveServer, engine_dir, launch, process_of
from waiting import has_ended, until

from arbor_core.cli.main import tiny_model

CHAT = "/v1/chat/completions"
HANG_SECONDS = 4.0
MOCK_PROMPT = "[mock: token_seconds=0.05] " + "word " * 200
"""Takes the simulated engine twenty seconds; to the other one it is a prompt as any."""
CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
"""Port 9 refuses: there is no hub."""


@dataclass
class Serving:
    """A server whose engine is of one kind."""

    live: LiveServer
    model: str
    models: Path

    def ask(self, text: str = "hello", model: str = "", **more: Any) -> Answer:
        body = {"model": model or self.model, "messages": [{"role": "user", "content": text}], "max_tokens": 4}
        return call(self.live.url, "POST", CHAT, {**body, **more})

    def engine(self) -> int:
        """Process id of the engine, which answers."""
        assert self.ask().status == 200, self.live.log
        return process_of(engine_dir(self.live))

    @property
    def engine_url(self) -> str:
        return str(json.loads((engine_dir(self.live) / "ready.json").read_bytes())["url"])


SILENT = "from arbor_core.server.http import sse; sse.PING_SECONDS = 600"
"""A stream that opens with a ping, because an engine takes long to fail, has no status for its error any more."""


@pytest.fixture(scope="module", params=["mock", pytest.param("transformers", marks=pytest.mark.ml)])
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("engines of a server")  # paths with spaces are paths too
    models = folder / "all models"
    models.mkdir()
    model = "mock/tiny"
    if request.param == "transformers":
        model = "tiny"
        tiny_model(models / model)
    limit = f"limits.engine_heartbeat_seconds={HANG_SECONDS}"
    chosen = (f"models.dirs=['{models}']", f"inference={request.param}", limit, "threads=1")
    live = launch(folder, *chosen, mock=False, env=CALM, before=SILENT)
    yield Serving(live, model, models)
    live.stop()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


# --- who may talk to an engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", "Basic x", "Bearer \u00e4"])
def test_an_engine_listens_to_its_server_alone(serving: Serving, given: str | None) -> None:
    serving.engine()
    headers = {} if given is None else {"authorization": given}
    asked = {"model": serving.model, "messages": [{"role": "user", "content": "hello"}]}
    loading = {"lora_name": "x", "lora_path": "/"}
    for method, path, body in [
        ("GET", "/v1/models", None),
        ("POST", CHAT, asked),
        ("POST", "/v1/completions", {"model": serving.model, "prompt": "hello"}),
        ("POST", "/v1/load_lora_adapter", loading),
        ("POST", "/v1/unload_lora_adapter", loading),
    ]:
        answer = call(serving.engine_url, method, path, body, headers)
        assert answer.status == 401, (path, answer.body)
        assert answer.json["error"]["code"] == "invalid_api_key"


def test_an_engine_listens_on_loopback_alone(serving: Serving) -> None:
    engine = serving.engine()
    sockets = {path.readlink().name for path in Path(f"/proc/{engine}/fd").iterdir() if path.is_symlink()}
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{engine}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                listening.append(local)
    port = urlsplit(serving.engine_url).port
    assert listening == [f"0100007F:{port:04X}"]


# --- engines that hang ------------------------------------------------------------------------------------------------


def stop_all(engine: int) -> None:
    """Stop an engine's process group, as a debugger or a broken driver would."""
    os.killpg(engine, signal.SIGSTOP)


@pytest.mark.parametrize("stream", [False, True], ids=["row-130", "row-130-stream"])
def test_an_engine_that_hangs_before_the_first_token(serving: Serving, stream: bool) -> None:
    engine = serving.engine()
    stop_all(engine)
    answer = serving.ask(stream=stream)
    answer.error(503, "engine_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    until(lambda: gone(engine))
    assert serving.engine() != engine
    assert f"does not answer for {HANG_SECONDS:g} s and is killed" in serving.live.log


def test_row_131_an_engine_that_hangs_in_a_stream(serving: Serving) -> None:
    engine = serving.engine()
    where = urlsplit(serving.live.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=PATIENCE)
    asked = {"model": serving.model, "messages": [{"role": "user", "content": MOCK_PROMPT}], "n": 8}
    connection.request("POST", CHAT, json.dumps({**asked, "stream": True, "max_tokens": 400, "ignore_eos": True}))
    response = connection.getresponse()
    assert response.status == 200
    assert response.readline().startswith(b"data: ")
    assert response.readline() == b"\n"  # perhaps no other event comes
    stop_all(engine)
    *_, error, done, end = response.read().split(b"\n\n")
    connection.close()
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "engine_dead"
    assert (done, end) == (b"data: [DONE]", b"")
    assert serving.engine() != engine


def test_an_engine_whose_loop_is_stuck(serving: Serving) -> None:
    if serving.model != "mock/tiny":
        pytest.skip("only the simulated engine can be told to be stuck")
    engine = serving.engine()
    serving.ask("[mock: hang=1]").error(503, "engine_unavailable")
    assert serving.engine() != engine
    assert "makes no progress with its work" in serving.live.log


def test_an_engine_that_takes_its_time_is_left_alone(serving: Serving) -> None:
    """A long answer, and in the simulated engine a long time before it begins."""
    engine = serving.engine()
    text = f"[mock: delay_seconds={HANG_SECONDS + 2}, token_seconds=0.05] " + "word " * 20
    assert serving.ask(text, max_tokens=50, ignore_eos=True, n=4).status == 200
    assert serving.engine() == engine


@pytest.mark.parametrize("state", ["running", "stopped"])
def test_an_engine_ends_with_its_server_even_if_it_hangs(serving: Serving, state: str, tmp_path: Path) -> None:
    live = launch(tmp_path, f"models.dirs=['{serving.models}']", inference(serving), mock=False, env=CALM)
    engine = Serving(live, serving.model, serving.models).engine()
    if state == "stopped":
        stop_all(engine)
    live.stop(signal.SIGKILL)
    until(lambda: has_ended(engine))


def inference(serving: Serving) -> str:
    return "inference=mock" if serving.model == "mock/tiny" else "inference=transformers"


# --- what clients hear ------------------------------------------------------------------------------------------------


@pytest.fixture
def embedded(serving: Serving) -> Serving:
    if serving.model == "mock/tiny":
        pytest.skip("the simulated engine reads no weights")
    return serving


@pytest.mark.parametrize("stream", [False, True])
def test_the_reason_why_weights_cannot_be_loaded_names_no_folder(embedded: Serving, stream: bool) -> None:
    broken = embedded.models / f"broken-{stream}"
    broken.mkdir()
    (broken / "config.json").write_bytes((embedded.models / "tiny" / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"not weights")
    answer = embedded.ask(model=broken.name, stream=stream)
    said = answer.error(503, "engine_unavailable")["message"]
    assert f"cannot load a model from {broken.name}: " in said
    for secret in (str(embedded.models.parent), "all models", "site-packages"):
        assert secret not in said
    assert str(broken) in embedded.live.log
    assert answer.headers["x-should-retry"] == "false"


def test_a_model_that_nobody_has_is_told_within_seconds_and_takes_no_device(embedded: Serving) -> None:
    engine = embedded.engine()
    before = engine_dir(embedded.live)
    began = time.monotonic()
    for stream in (False, True, False):
        answer = embedded.ask(model="org/nmae", stream=stream)
        said = answer.error(404, "model_not_found", "model")["message"]
        assert "the hub could not be asked" in said
    assert time.monotonic() - began < 100
    assert embedded.live.log.count("engine of org/nmae: ") == 1
    assert engine_dir(embedded.live) == before
    assert embedded.engine() == engine
