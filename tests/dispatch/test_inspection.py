"""Jobs whose trainer is asked what it would train, in a process of its own, before they are queued."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_calls import JOBS, call
from live import LiveServer
from waiting import until

from arbor_core import TrainedWeights, Trainer
from arbor_core.dispatch.inspection import Inspections
from arbor_core.jobs.records import JobSpec
from arbor_core.types import RolloutConfig

ASKED = """
import os, signal
from pathlib import Path
from arbor_core import JobFailed, TrainedWeights

def inspect(config, model):
    print("libraries print")
    log = Path(config["log"])
    before = log.stat().st_size if log.exists() else 0
    with log.open("a") as file:
        file.write("x")
    if config["do"] == "refuse":
        raise JobFailed(f"no such modules in {model}")
    if config["do"] == "die" or (config["do"] == "die once" and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    if config["do"] == "fail":
        raise RuntimeError("no libraries")
    if config["do"] == "not know":
        return None
    return TrainedWeights(adapter="lora", kinds={config["do"]: "layer"})
"""


class LinearOnly:
    """Engines that take adapters of linear layers."""

    def is_open(self, model: str, trained: TrainedWeights) -> bool:
        return not trained.kinds

    def refusal(self, model: str, trained: TrainedWeights, where: str) -> tuple[str, str] | None:
        return None if set(trained.kinds) == {"linear"} else (where, f"{where}: {model} is not served so")


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`await ask("refuse")`: the report of a job, by inspections that remember."""
    (tmp_path / "asked_of.py").write_text(ASKED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    inspections = Inspections(LinearOnly(), asyncio.Semaphore(2))
    unknown = TrainedWeights(adapter="lora")
    trainer = Trainer(RolloutConfig, "x:y", adapter=lambda _: unknown, inspect="asked_of:inspect")

    async def asked(do: str) -> Any:
        import sys

        config = {"do": do, "log": str(tmp_path / do)}
        spec = JobSpec("t", "t", config, model="tiny", model_path=None, seed=1, input="rollouts")
        assert inspections.needed(spec, trainer)
        return await inspections.report(spec, trainer, sys.executable, "/models/tiny")

    return asked


@pytest.mark.parametrize(
    ("do", "message"),
    [
        ("linear", None),
        ("embedding", "method.t.hyperparameters: tiny is not served so"),
        ("refuse", "no such modules in /models/tiny"),
        ("die once", "method.t.hyperparameters: tiny is not served so"),
    ],
)
async def test_what_a_trainer_says_decides_and_is_remembered(
    ask: Callable[..., Any], tmp_path: Path, do: str, message: str | None
) -> None:
    report = await ask(do)
    error = {"code": "invalid_hyperparameters", "message": message, "param": "hyperparameters"}
    assert (report.error, report.warnings) == (error if message else None, [])
    asked = (tmp_path / do).read_text()
    assert (await ask(do)).error == report.error
    assert (tmp_path / do).read_text() == asked, "it is asked once"


@pytest.mark.parametrize("do", ["fail", "die", "not know"])
async def test_what_cannot_be_found_out_is_a_warning_and_is_asked_again(
    ask: Callable[..., Any], tmp_path: Path, do: str
) -> None:
    report = await ask(do)
    assert report.error is None
    assert [text for text in report.warnings if "could not be found out" in text]
    asked = (tmp_path / do).stat().st_size
    await ask(do)
    assert (tmp_path / do).stat().st_size > asked


@pytest.mark.ml
@pytest.mark.slow
def test_lora_on_the_embedding(
    start_server: Callable[..., LiveServer], chat_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Both methods refuse it before anything is trained, and train a job on linear layers by name."""
    from arbor_core.cli.main import tiny_model

    tiny_model(tmp_path / "models" / "tiny")
    server = start_server("+trainer=sft", f"models.dirs=[{tmp_path / 'models'}]", mock=False)
    file = server.upload(chat_rows)

    def job(method: str, *modules: str) -> str:
        lora = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": list(modules)}
        chosen = {"type": method, method: {"hyperparameters": {"lora": lora}}}
        body = {"model": "tiny", "method": chosen, **({"training_file": file} if method == "supervised" else {})}
        return str(call(server.url, "POST", JOBS, body).json["id"])

    def with_status(job_id: str, status: str) -> dict[str, Any]:
        """A job, as soon as it has this status."""
        path = f"{JOBS}/{job_id}"
        return dict(until(lambda: (found := call(server.url, "GET", path).json)["status"] == status and found, 300))

    jobs = {method: job(method, "embed_tokens") for method in ("supervised", "grpo")}
    good = job("grpo", "q_proj")
    for method, found in jobs.items():
        error = with_status(found, "failed")["error"]
        assert error["code"] == "invalid_hyperparameters"
        assert f"method.{method}.hyperparameters.lora.target_modules" in error["message"]
        assert "modules of the kinds linear; this one is of the kind embedding" in error["message"]
        assert not (server.storage / "jobs" / found / "attempts").exists()
    with_status(good, "running")
    server.cancel_all()
