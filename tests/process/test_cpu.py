"""Vector instructions: a job that was made with AVX2 is held to it on a processor that has AVX-512."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attempts import attempt_order, ended, text_of, write_job_document
from jobs import events
from live import LiveServer
from waiting import until, until_async

from arbor_core import ExecutorSettings, Placement
from arbor_core.builtin.executor import LocalExecutor
from arbor_core.cli.main import tiny_model
from arbor_core.process.cpu import instruction_set, instruction_set_env
from arbor_core.storage.event_log import tail
from arbor_core.types import Device

HERE = instruction_set({})
needs_avx512 = pytest.mark.skipif(HERE != "avx512f", reason="this processor has no AVX-512")
SETTINGS = {"n_epochs": 5, "batch_size": 1, "learning_rate": 1e-3, "lora": None}


@pytest.mark.parametrize(
    ("made", "here", "held"),
    [
        ("avx2", "avx512f", "avx2"),
        ("avx512f", "avx512f", None),
        ("avx2", "avx2", None),
        ("avx512f", "avx2", None),
        ("x86_64", "avx512f", None),
        ("avx2", "aarch64", None),
        ("", "avx512f", None),
    ],
)
def test_only_a_wider_processor_is_held_back(made: str, here: str, held: str | None) -> None:
    assert instruction_set_env(made, here).get("ATEN_CPU_CAPABILITY") == held


@needs_avx512
def test_a_process_that_is_held_says_so() -> None:
    assert instruction_set(instruction_set_env("avx2", HERE)) == "avx2"
    assert instruction_set({"ATEN_CPU_CAPABILITY": "avx512"}) == HERE


@needs_avx512
@pytest.mark.ml
@pytest.mark.parametrize(("made", "says"), [("avx2", "AVX2"), ("avx512f", "AVX512")])
async def test_an_attempt_computes_as_its_job_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, says: str
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "vectored.py").write_text(
        "import os, torch\nPID = os.getpid()\n"
        "def train(run): run.message(torch.backends.cpu.get_cpu_capability(), template=PID)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    executor = LocalExecutor(ExecutorSettings("warm", tmp_path / "run"))
    try:
        order = attempt_order(tmp_path, "", argv=(), preload=("vectored",), env=instruction_set_env(made, HERE))
        write_job_document(order, "vectored:train")
        ref = await executor.start(order, Placement((Device("cpu:0"),), threads=1))
        assert (await until_async(lambda: ended(order), 120)).code == 0, text_of(order.dir / "worker.log")
    finally:
        await executor.close()
    [(_, event)] = tail(order.dir / "events.jsonl")
    assert event.message == says
    assert bool(executor.fork_servers) is (made == HERE), "what was imported before computes as it likes"
    assert ref


@needs_avx512
@pytest.mark.ml
@pytest.mark.timeout(900)
def test_row_102_a_job_made_with_narrower_instructions_goes_on_with_them(
    start_server: Callable[..., LiveServer], tmp_path: Path, chat_rows: list[dict[str, Any]]
) -> None:
    """The first server takes itself for a machine with AVX2; the second sees what there is."""
    pytest.importorskip("arbor_sft")
    tiny = tmp_path / "models" / "tiny"
    tiny_model(tiny)
    options = ("+trainer=sft", "inference=mock", "threads=1", f"models.dirs=[{tmp_path / 'models'}]")
    server = start_server(*options, env={"ATEN_CPU_CAPABILITY": "avx2"}, mock=False)
    client = server.new_client(_strict_response_validation=False)  # OpenAI's own type lacks "paused"
    twin, job = create(server, chat_rows), create(server, chat_rows)
    client.fine_tuning.jobs.pause(job)  # while its twin has the device
    assert server.wait(twin).status == "succeeded"
    until(lambda: client.fine_tuning.jobs.retrieve(job).status == "paused")
    server.stop()

    server = start_server(*options, mock=False)
    wide = create(server, chat_rows)
    server.client.fine_tuning.jobs.resume(job)
    assert server.wait(job).status == "succeeded"
    assert server.wait(wide).status == "succeeded"
    assert digests(server, job) == digests(server, twin) != digests(server, wide)
    assert not [event.message for event in events(server, job) if event.level != "info"]


def create(server: LiveServer, rows: list[dict[str, Any]]) -> str:
    return server.client.fine_tuning.jobs.create(
        model="tiny",
        training_file=server.upload(rows),
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": SETTINGS}},  # type: ignore[typeddict-item]
    ).id


def digests(server: LiveServer, job: str) -> dict[int, str]:
    return {event.data["step"]: event.data["digest"] for event in events(server, job) if event.type == "metrics"}
