"""What every trainer has to report right, whatever it learns from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from arbor_core import plugins
from arbor_core.jobdir import checkpoints
from arbor_core.jobdir.documents import read_document
from arbor_core.types import CheckpointEvent, ErrorEvent, MetricsEvent, PausedEvent, ResultEvent, TrainedWeights

from .hardware import device
from .job_directory import JobDirectory

LAST_WORDS = (ResultEvent, ErrorEvent, PausedEvent)
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Number formats in the words of safetensors, and ours."""
RESUMED_TOLERANCE = 1e-3
"""How far a resumed run's losses may be from an uninterrupted one's, relatively."""


def check_numbers(event: MetricsEvent) -> None:
    """The metrics of a step are numbers, the loss among them."""
    for key, value in event.values.items():
        good = isinstance(value, int | float) and math.isfinite(value)
        assert good, f"metrics of step {event.step}: {key} is {value!r}, expected a finite number"
    assert "train_loss" in event.values, f"metrics of step {event.step} have no train_loss"


def check_checkpoints(job: JobDirectory) -> None:
    """Every checkpoint that was reported is whole, and none is half-written."""
    for event in job.events(CheckpointEvent):
        reason = checkpoints.fault(job.files.checkpoints / event.dir)
        assert reason is None, f"checkpoint {event.dir}: {reason}"
    left = [path.name for path in job.files.checkpoints.glob("*.tmp")]
    assert not left, f"unfinished checkpoints are left: {left}"


def check_result(job: JobDirectory) -> ResultEvent:
    """The last word is a result, with a whole checkpoint; nothing else is left. Returns it."""
    (*_, last) = job.events()
    assert isinstance(last, ResultEvent), (
        f"the last event is '{last.type}', expected 'result': call run.finish at the end"
    )
    assert len(job.events(*LAST_WORDS)) == 1, "there is more than one of result, error and paused"
    folder = job.files.checkpoints / last.dir
    assert checkpoints.fault(folder) is None, f"the result's checkpoint {folder.name} is not whole"
    assert last.trained_tokens > 0, "the result's trained_tokens is not above 0"
    is_adapter = (folder / "adapter_config.json").is_file()
    assert last.adapter == is_adapter, (
        f"finish(adapter={last.adapter}), but there is {'an' if is_adapter else 'no'} adapter_config.json"
    )
    assert not (job.attempt_dir / "work").exists(), "the scratch directory outlives the attempt"
    if said := plugins.load().get("trainers", job.trainer).trained(read_document(job.files).config):
        check_stored(folder, said)
    return last


def check_stored(folder: Path, said: TrainedWeights) -> None:
    """Trained weights are stored in the number format that their trainer tells, if it does."""
    dtypes = set()
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        dtypes |= {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    found = {DTYPES.get(dtype, dtype) for dtype in dtypes}
    assert said.dtype is None or found == {said.dtype}, (
        f"the weights in {folder.name} are stored as {sorted(found)}, and 'adapter' tells the dtype {said.dtype}"
    )


def check_cancel(job: JobDirectory) -> None:
    """Cancelled, it stops between steps, with neither a result nor an error."""
    job.ask("cancel")
    status = job.attempt()
    assert status == 0, f"asked to cancel, the worker ended with status {status}:\n{job.log}"
    said = [event.type for event in job.events(*LAST_WORDS)]
    assert not said, f"cancelled, it still reported {said}: let JobStopped pass"


def check_paused(job: JobDirectory) -> None:
    """An attempt that was asked to pause while it waits for clients says last that it has paused."""
    last = job.events()[-1]
    assert isinstance(last, PausedEvent), (
        f"asked to pause, the last event is '{last.type}': call run.stop_if_asked while waiting"
    )


def check_same(mine: list[MetricsEvent], theirs: list[MetricsEvent], why: str = "a pause") -> None:
    """Steps of a run that was interrupted and of one that was not."""
    steps, expected = ([event.step for event in events] for events in (mine, theirs))
    assert steps == expected, f"after {why} the steps are {steps}; expected {expected}"
    for one, other in zip(mine, theirs, strict=True):
        step, a, b = one.step, one.values["train_loss"], other.values["train_loss"]
        assert one.fed == other.fed, f"step {step} was made of {one.fed} after {why}, of {other.fed} without"
        alike = math.isclose(a, b, rel_tol=RESUMED_TOLERANCE, abs_tol=1e-6)
        assert alike, f"step {step}: the loss is {a} after {why}, {b} without"
        same = one.digest == other.digest or device().kind != "cpu"  # a GPU may add in another order
        assert same, f"step {step}: the digest of the parameters is another after {why} than without"
