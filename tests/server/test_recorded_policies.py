"""What a real engine samples for a live job is in its ledger, token by token: real server, engine and model."""

from __future__ import annotations

import json
import sqlite3
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_calls import JOBS, call
from live import LiveServer, launch

from arbor_core.rollouts.completion_ledger import Ledger
from arbor_core.types import Completion

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
tiny = pytest.importorskip("arbor_sft.tiny")
pytest.importorskip("arbor_transformers")
pytest.importorskip("arbor_mock")

CHAT, JSON = "/v1/chat/completions", {"content-type": "application/json"}
HELLO = [{"role": "user", "content": "say something"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("real")
    tiny.make(root / "models" / "tiny")
    live = launch(root, f"models.dirs=[{root / 'models'}]", "threads=1", "engine.dtype=float32", mock=False)
    yield live
    live.cancel_all()
    live.stop()


@pytest.fixture(scope="module")
def job(server: LiveServer) -> str:
    body = {"model": "tiny", "method": {"type": "mock_grpo", "mock_grpo": {"hyperparameters": {}}}}
    return str(call(server.url, "POST", JOBS, body, JSON).json["id"])


def base(server: LiveServer) -> Path:
    return server.storage.parent / "models" / "tiny"


def recorded(server: LiveServer, job: str, answer: dict[str, Any]) -> Completion:
    ledger = Ledger(server.storage / "jobs" / job / "ledger")
    found = ledger.get(answer["id"])
    ledger.close()
    assert found is not None
    return found


def forward(model: Any, found: Completion) -> tuple[list[float], list[int], list[int]]:
    """The log-probabilities of the recorded tokens by a plain forward pass; prompt and completion."""
    prompt, tokens = list(array("i", found.prompt)), list(array("i", found.tokens))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / (found.temperature or 1.0)).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), prompt, tokens


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_and_logprobs_are_the_samplers(server: LiveServer, job: str, stream: bool) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base(server))
    end = tokenizer.eos_token_id
    asked = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 12, "logit_bias": {str(end): 4}, "stream": stream}
    raw = call(server.url, "POST", CHAT, {"model": job, "messages": HELLO, **asked}, JSON).body
    answer = json.loads(raw.split(b"\n\n")[0].removeprefix(b"data: ")) if stream else json.loads(raw)
    found = recorded(server, job, answer)
    expected, prompt, tokens = forward(transformers.AutoModelForCausalLM.from_pretrained(base(server)), found)
    assert prompt == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    assert list(array("f", found.logprobs)) == pytest.approx(expected, abs=1e-4)
    assert (tokens[-1] == end) == (found.finish == "stop")


def test_the_end_of_a_turn_is_a_token_of_the_policy_that_sampled_it(server: LiveServer, job: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base(server))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(server.storage / "jobs" / job / "weights" / "3-1")
    with sqlite3.connect(server.storage / "arbor.db", timeout=10) as db:
        db.execute("INSERT OR REPLACE INTO policies(job_id,version,handled,dir) VALUES(?,3,3,'3-1')", (job,))
    db.close()
    end = transformers.AutoTokenizer.from_pretrained(base(server)).eos_token_id
    body = {"model": job, "messages": HELLO, "logit_bias": {str(end): 100}}
    answer = call(server.url, "POST", CHAT, body, JSON).json
    found = recorded(server, job, answer)
    assert (found.version, answer["policy_version"]) == (3, 3)
    expected, _, tokens = forward(adapted, found)
    assert (tokens, found.finish, answer["choices"][0]["message"]["content"]) == ([end], "stop", "")
    assert list(array("f", found.logprobs)) == pytest.approx(expected, abs=1e-3)
