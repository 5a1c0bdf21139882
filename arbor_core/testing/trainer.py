"""`check_trainer`: what every trainer has to do right."""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from arbor_core import plugins
from arbor_core.config import convert
from arbor_core.jobdir.documents import import_object
from arbor_core.types import (
    CheckpointEvent,
    ConfigError,
    HyperparametersResolved,
    MetricsEvent,
    PausedEvent,
    ResultEvent,
    RolloutConfig,
    TrainedWeights,
    Trainer,
)

from . import rollouts
from .commands import check_executing
from .job_directory import JobDirectory, yaml_of
from .reports import LAST_WORDS, check_cancel, check_checkpoints, check_numbers, check_result, check_same
from .resume_points import EVERY_STEP, check_killed

HEAVY = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm", "jax", "tensorflow")
"""What a plugin's own module may not import: the server does, and every command."""


def check_trainer(
    name: str,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    model: str | Path | None = None,
    commands: Sequence[bytes] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
) -> None:
    """Check an installed trainer.

    Always: that its configuration's struct and YAML agree and refuse what they should, that the functions it names
    exist, and that listing plugins imports no deep-learning library. With `rows` and `model` jobs are run, each attempt
    in a process of its own: one to its end, one that is paused and resumed, one that is killed, one that is cancelled.
    For a trainer that learns from rollouts `model` is enough: groups are made up, and jobs are finished too (see
    `rollouts`). For one that executes commands give `model` and `commands` (see `arbor_core.testing.commands`).

    Args:
        rows: Rows that it can be trained on, enough for two steps and few enough for seconds.
        model: A base model for them.
        commands: For a trainer that executes commands: three or more of them, as their payloads stand in the inbox. The
            answers may depend on nothing but the commands and the job.
        hyperparameters: Laid over its YAML, to make the run short.

    Raises:
        AssertionError: what was expected.
        ArborError: there is no such trainer.
    """
    trainer: Trainer = plugins.load().get("trainers", name)
    check_config(name, trainer)
    check_functions(trainer)
    check_light()
    live = trainer.input != "file"
    assert rows is None or not live, f"{name} learns from {trainer.input}: give check_trainer a model, and no rows"
    if trainer.input == "rollouts":
        assert issubclass(trainer.config, RolloutConfig), f"{trainer.config.__name__} is no RolloutConfig"
    executes = trainer.input == "commands"
    assert commands is None or executes, f"{name} learns from {trainer.input}: give check_trainer no commands"
    if model is None or (rows is None and not live) or (commands is None and executes):
        assert rows is None, "check_trainer: rows were given without a model"
        assert commands is None, "check_trainer: commands were given without a model"
        return
    if not live:
        check_rows(trainer, rows or ())
    with tempfile.TemporaryDirectory() as folder:
        root, values = Path(folder), dict(hyperparameters or {})
        if trainer.input == "rollouts":
            values |= {**rollouts.SIZE, **supported(rollouts.PROBES, name)}

        def job(kind: str, **more: Any) -> JobDirectory:
            return JobDirectory(root / kind, name, rows or (), str(model), {**values, **more})

        often = supported(EVERY_STEP, name)
        if commands:
            check_executing(job, commands, often)
        else:
            (rollouts.check_learning if live else check_training)(job, often)


def supported(hyperparameters: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Hyperparameters that some trainers have, or nothing for one that has them not."""
    return hyperparameters if hyperparameters.keys() <= yaml_of(name).keys() else {}


def check_training(make: Callable[..., JobDirectory], often: Mapping[str, Any]) -> None:
    """Jobs that learn from a file.

    Args:
        make: Makes a new one of a name and hyperparameters.
        often: Hyperparameters with which there is a resume point after each step; empty: the trainer writes none.
    """
    whole = make("whole")
    check_run(whole)
    check_pause(make("paused"), whole)
    check_killed(make("killed", **often), whole, points=bool(often))
    check_cancel(make("cancelled"))


def check_config(name: str, trainer: Trainer) -> None:
    """The struct has the types, the YAML the defaults, and both the same keys."""
    values = yaml_of(name)
    typed, written = set(convert.key_paths(trainer.config)), set(_paths(values))
    assert written <= typed, f"{name}.yaml has keys that {trainer.config.__name__} does not: {sorted(written - typed)}"
    missing = {key for key in typed - written if not _inside_null(key, values)}
    assert not missing, f"{name}.yaml lacks keys of {trainer.config.__name__}: {sorted(missing)}"
    with_default = [field.name for field in msgspec.structs.fields(trainer.config) if not field.required]
    assert not with_default, (
        f"{trainer.config.__name__} has defaults ({with_default}): they belong in {name}.yaml alone"
    )
    convert.typed(values, trainer.config, f"{name}.yaml")
    if trainer.adapter:
        said = trainer.adapter(values)
        assert isinstance(said, bool | TrainedWeights), f"{name}: 'adapter' returns neither a bool nor TrainedWeights"
    msgspec.json.schema(trainer.config)
    for key in values:
        check_misspelled(key, values, trainer.config)


def _paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")


def _inside_null(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key belongs to a group that the YAML switches off."""
    first, *rest = key.split(".")
    value = values.get(first, ())
    return value is None or bool(rest and isinstance(value, Mapping) and _inside_null(".".join(rest), value))


def check_misspelled(key: str, values: Mapping[str, Any], struct: type[msgspec.Struct]) -> None:
    """A key with a letter too many is refused, and the nearest one is named."""
    wrong = f"{key}x"
    if wrong in values:
        return
    said = ""
    try:
        convert.typed({**values, wrong: 1}, struct, "")
    except ConfigError as error:
        said = str(error)
    assert said, f"{struct.__name__} takes any key ('{wrong}'): declare it with forbid_unknown_fields=True"
    near = get_close_matches(wrong, list(values), n=1)[0]
    assert near in said, f"the key '{wrong}' is refused without naming '{near}': {said}"


def check_functions(trainer: Trainer) -> None:
    """What the trainer names is there. Its entry is looked for, not imported: only a worker imports it."""
    named = {
        "entry": trainer.entry,
        "prove": trainer.prove,
        "model_check": trainer.model_check,
        "inspect": trainer.inspect,
    }
    for what, path in named.items():
        if path is None:
            continue
        module, _, function = path.partition(":")
        spec = find_spec(module)
        assert spec is not None, f"{what}: there is no module {module}"
        tree = ast.parse(Path(str(spec.origin)).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert function in names, f"{what}: {module} defines no '{function}'"
    for module in trainer.preload:
        assert find_spec(module), f"preload: there is no module {module}"
    assert callable(import_object(trainer.check_row)), f"check_row: {trainer.check_row} cannot be called"


def check_light() -> None:
    """Loading every plugin and asking what it brings imports none of the heavy libraries."""
    script = (
        "import sys; from arbor_core import plugins; found = plugins.load(); "
        "[found.all(kind) for kind in plugins.KINDS]; "
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    heavy = ran.stdout.split()
    assert not heavy, f"listing plugins imported {heavy}: import them in the module that `entry` names"


def check_rows(trainer: Trainer, rows: Sequence[Mapping[str, Any]]) -> None:
    """Good rows pass, and a row that is nothing is refused with a ValueError that says why."""
    check_row = import_object(trainer.check_row)
    for row in rows:
        check_row(row)
    said = None
    try:
        check_row({})
    except ValueError as error:
        said = str(error)
    assert said is not None, f"{trainer.check_row} takes an empty row"
    assert said, f"{trainer.check_row} refuses a row without saying why"


def check_run(job: JobDirectory) -> None:
    """One attempt from beginning to end."""
    status = job.attempt()
    assert status == 0, f"the worker ended with status {status}:\n{job.log}"
    check_metrics(job.events(MetricsEvent))
    check_checkpoints(job)
    check_result(job)
    check_resolved(job)


def check_metrics(events: Sequence[MetricsEvent]) -> None:
    """Every step once, from 1, each with numbers; the total is the last step's."""
    assert events, "no metrics were reported"
    steps = [event.step for event in events]
    assert steps == sorted(set(steps)), f"metrics do not come in the order of steps: {steps}"
    assert steps[0] >= 1, f"steps count from 1, the first is {steps[0]}"
    totals = {event.total_steps for event in events}
    assert totals == {steps[-1]}, f"total_steps is {sorted(totals)}, the last step is {steps[-1]}"
    for event in events:
        check_numbers(event)


def check_resolved(job: JobDirectory) -> None:
    """What was `"auto"` among OpenAI's hyperparameters has been reported as a number."""
    values = {**yaml_of(job.trainer), **job.hyperparameters}
    auto = {key for key in ("n_epochs", "batch_size", "learning_rate_multiplier") if values.get(key) == "auto"}
    told = {
        key
        for event in job.events(HyperparametersResolved)
        for key, value in event.hyperparameters.items()
        if value != "auto"
    }
    assert auto <= told, f"{sorted(auto - told)} stayed 'auto': report the numbers with run.resolved"


def check_pause(job: JobDirectory, whole: JobDirectory) -> None:
    """Paused between steps, with a checkpoint; resumed, it does the rest and ends where an uninterrupted run does."""
    job.ask("pause")
    status = job.attempt()
    assert status == 0, f"asked to pause, the worker ended with status {status}:\n{job.log}"
    last = job.events()[-1]
    assert isinstance(last, PausedEvent), (
        f"asked to pause, the last event is '{last.type}': call run.stop_if_asked every step"
    )
    done = [event.step for event in job.events(MetricsEvent)]
    saved = [event.step for event in job.events(CheckpointEvent)]
    assert not done or saved[-1:] == done[-1:], f"paused after step {done[-1:]}, with checkpoints of {saved}"
    job.ask("run")
    status = job.attempt()
    assert status == 0, f"the resumed worker ended with status {status}:\n{job.log}"
    both = [*job.events(MetricsEvent, attempt=1), *job.events(MetricsEvent, attempt=2)]
    check_same(both, whole.events(MetricsEvent))
    assert isinstance(job.events(*LAST_WORDS)[-1], ResultEvent), "the resumed run did not finish"
