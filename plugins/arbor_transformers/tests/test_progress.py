"""How the engine knows that it makes progress, and that nobody has a model."""

import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from arbor_transformers import NOT_THERE, Options, TransformersBackend, hub
from arbor_transformers.generation.loop import GenerationLoop
from arbor_transformers.model.loading import load, make_batch, mark_progress
from arbor_transformers.model.lora import AdapterRows
from embedded import World, options
from transformers import LlamaForCausalLM
from waiting import until

from arbor_core.engine import Progress, UnknownModelError
from arbor_core.testing import device


def test_a_loop_without_work_is_never_stuck_and_one_with_a_call_that_hangs_is(world: World) -> None:
    loaded = load(str(world.model), device(), Options(**options()))
    batch, _ = make_batch(loaded, AdapterRows(loaded.model), Options(**options()))
    engine = GenerationLoop(batch, 4, 100, 32, lambda _: None, lambda: None)
    engine.start()
    held, begun = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        held.wait()

    try:
        engine.call(lambda: None).result(120)
        until(lambda: engine.progress.stalled_seconds == 0)
        stuck = engine.call(hang)
        assert begun.wait(120)
        until(lambda: engine.progress.stalled_seconds > 0.2)
        held.set()
        stuck.result(120)
        until(lambda: engine.progress.stalled_seconds == 0)
    finally:
        held.set()
        engine.stop()


def test_every_layer_is_progress(world: World) -> None:
    """So a forward pass may take as long as it likes, if its layers do not."""
    model = LlamaForCausalLM.from_pretrained(world.model)
    marks: list[float] = []

    class Counted(Progress):
        def mark(self) -> None:
            marks.append(time.monotonic())

    mark_progress(model, Counted())
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(marks) == model.config.num_hidden_layers


async def test_a_directory_that_is_gone_is_no_model(world: World, tmp_path: Path) -> None:
    await TransformersBackend().find(str(world.model))
    with pytest.raises(UnknownModelError, match="is not there"):
        await TransformersBackend().find(str(tmp_path / "gone"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A hub that knows one model; the paths it was asked for."""
    paths: list[str] = []

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            known = self.path.startswith("/api/models/org/known")
            body = b'{"id": "org/known", "modelId": "org/known", "siblings": []}' if known else b"{}"
            self.send_response(200 if known else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            if not known:
                self.send_header("x-error-code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Nothing for the tests' output."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    yield paths
    server.shutdown()
    server.server_close()
    thread.join()


async def test_the_hub_is_asked_for_models_that_are_not_here(asked: list[str]) -> None:
    await TransformersBackend().find("org/known")
    with pytest.raises(UnknownModelError, match="the hub has no such model"):
        await TransformersBackend().find("org/nmae")
    assert [path for path in asked if "/models/" in path] == ["/api/models/org/known", "/api/models/org/nmae"]


async def test_a_model_in_the_cache_needs_no_hub(asked: list[str], tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "hub" / "models--org--cached"
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    await TransformersBackend().find("org/cached")
    assert asked == []


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE forbids"),
        ("HF_ENDPOINT", "http://127.0.0.1:9", "the hub could not be asked"),
    ],
)
async def test_without_a_hub_a_model_that_is_not_here_is_none(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UnknownModelError, match=says):
        await TransformersBackend().find("org/known")
    assert time.monotonic() - began < 100
    assert asked == []


def test_asking_the_hub_needs_no_torch() -> None:
    code = "import sys, arbor_transformers.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL).returncode == 0
    assert hub.NOT_THERE == NOT_THERE
