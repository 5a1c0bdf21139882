"""One server, two inference backends: each model has the engine that the settings chose, and neither disturbs another.

The embedded engine serves `tiny`, the simulated one everything else; adapters of both come from jobs.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import pytest
from completions import CHAT, MODEL, frames, post
from http_calls import JOBS, Answer, call
from live import ENDED, LiveServer, launch, process_of
from waiting import until

pytest.importorskip("trl")
pytestmark = [pytest.mark.ml, pytest.mark.slow]
CHOSEN = (
    "inference=mock_direct",
    "inference.models={tiny: transformers}",
    "engine.devices=1",
    "engine.share=1",
    "engine.replicas=1",
)
CALM = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
HELLO = "hello there"
LONG = "[mock: token_seconds=0.02] " + "word " * 40


@dataclass
class Both:
    """A server with both backends, and an adapter of each."""

    live: LiveServer
    tuned: str
    mock_tuned: str

    def chat(self, model: str, text: str = HELLO, **more: Any) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 80, "temperature": 0}
        return post(self.live, CHAT, {**body, **more})

    def first_logprob(self, model: str) -> float:
        """Of the embedded engine: of the first token of a fixed answer."""
        answer = self.chat(model, logprobs=True)
        return float(answer.json["choices"][0]["logprobs"]["content"][0]["logprob"])

    def weights(self, model: str) -> str:
        """Of the simulated engine: which weights answer."""
        return content(self.chat(model, "[mock: weights=1]"))

    def engine(self, model: str) -> int:
        """Process id of the engine of a base model."""
        folders = (path.parent for path in (self.live.storage / "engines").glob("*/ready.json"))
        mine = [one for one in folders if json.loads((one / "spec.json").read_bytes())["model"] == model]
        return process_of(max(mine, key=lambda one: int(one.name)))


def content(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    return str(answer.json["choices"][0]["message"]["content"])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    from arbor_core.cli.main import tiny_model

    folder = tmp_path_factory.mktemp("two backends")
    tiny_model(folder / "models" / "tiny")
    live = launch(folder, *CHOSEN, f"models.dirs=['{folder / 'models'}']", mock=False, env=CALM)
    rows = [
        {"messages": [{"role": "user", "content": HELLO}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(12)
    ]
    file = live.upload(rows)
    tuned = [
        trained(live, model, method, values, file)
        for model, method, values in (
            ("tiny", "supervised", {"max_steps": 4, "learning_rate": 1e-2}),
            (MODEL, "mock", {"steps": 3}),
        )
    ]
    yield Both(live, *tuned)
    live.stop()


def trained(live: LiveServer, model: str, method: str, values: dict[str, Any], file: str) -> str:
    """The model that a job has trained."""
    chosen = {"type": method, method: {"hyperparameters": values}}
    job = call(live.url, "POST", JOBS, {"model": model, "training_file": file, "method": chosen}).json
    path = f"{JOBS}/{job['id']}"
    ended = until(lambda: (found := call(live.url, "GET", path).json)["status"] in ENDED and found, seconds=300)
    assert ended["status"] == "succeeded", ended["error"]
    return str(ended["fine_tuned_model"])


def saved_weights(both: Both) -> str:
    """The SHA-256 of the simulated job's result."""
    (saved,) = both.live.storage.glob("jobs/*/checkpoints/3-1/adapter_model.safetensors")
    return sha256(saved.read_bytes()).hexdigest()


def test_chats_to_both_at_once_are_answered_by_their_own_engines(both: Both) -> None:
    base, tuned = both.first_logprob("tiny"), both.first_logprob(both.tuned)
    assert base != tuned
    expected: list[tuple[Callable[[], Any], Any]] = [
        (lambda: both.first_logprob("tiny"), base),
        (lambda: content(both.chat(MODEL)), HELLO),
        (lambda: both.first_logprob(both.tuned), tuned),
        (lambda: content(both.chat(both.mock_tuned)), HELLO),
        (lambda: both.weights(MODEL), "base"),
        (lambda: both.weights(both.mock_tuned), saved_weights(both)),
    ]
    with ThreadPoolExecutor(len(expected)) as pool:
        asked = [(pool.submit(ask), wanted) for ask, wanted in expected * 3]
        for answer, wanted in asked:
            assert answer.result() == (pytest.approx(wanted, abs=1e-4) if isinstance(wanted, float) else wanted)
    assert both.engine("tiny") != both.engine(MODEL)


def test_the_model_list_has_the_models_of_both(both: Both) -> None:
    names = {model.id for model in both.live.client.models.list()}
    assert {"tiny", both.tuned, both.mock_tuned} <= names
    assert both.live.client.models.retrieve(both.mock_tuned).id == both.mock_tuned


@pytest.mark.parametrize(("dies", "lives"), [(MODEL, "tiny"), ("tiny", MODEL)])
def test_the_death_of_one_engine_does_not_disturb_the_other(both: Both, dies: str, lives: str) -> None:
    tuned = {"tiny": both.tuned, MODEL: both.mock_tuned}
    for model in (dies, lives, tuned[dies], tuned[lives]):
        content(both.chat(model))
    doomed, other = both.engine(dies), both.engine(lives)
    with ThreadPoolExecutor(1) as pool:
        more = {"stream": True, "max_tokens": 120, "ignore_eos": True}
        stream = pool.submit(both.chat, tuned[lives], LONG, **more)
        os.kill(doomed, signal.SIGKILL)
        until(lambda: both.chat(tuned[dies]).status == 200)
        events = frames(stream.result().body)
    assert not [event for event in events if "error" in event], events[-1]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert both.engine(lives) == other
    assert both.engine(dies) != doomed
    devices = call(both.live.url, "GET", "/v1/arbor/devices").json["data"]
    owners = sorted(lease["owner"] for one in devices for lease in one["leases"])
    assert owners == [f"engine:{MODEL}", "engine:tiny"]
