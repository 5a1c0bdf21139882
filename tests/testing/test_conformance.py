"""What every plugin brings against the conformance kit; the kit against bad ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arbor_core import (
    AllocatorSettings,
    AttemptDir,
    AttemptOrder,
    ErrorEvent,
    ExecutorSettings,
    MetricsEvent,
    Placement,
    Plan,
    Snapshot,
    Trainer,
)
from arbor_core.config.compose import defaults
from arbor_core.plugins import load
from arbor_core.testing import (
    JobDirectory,
    check_allocator,
    check_backend,
    check_executor,
    check_launcher,
    check_policies,
    check_scheduler,
    check_trainer,
)
from arbor_core.testing import commands as command_checks
from arbor_core.testing import executor as executor_checks
from arbor_core.testing import reports as report_checks
from arbor_core.testing import resume_points as resume_checks
from arbor_core.testing import rollouts as rollout_checks
from arbor_core.testing import trainer as trainer_checks

INSTALLED = load()
LIGHT = {"mock", "mock_commands", "mock_grpo", "mock_direct"}
"""What needs no torch."""
LAUNCHERS = list(INSTALLED.all("launchers"))
COMMANDS = {
    "mock_commands": [
        b'{"do": "add", "n": 5}',
        b'{"do": "publish"}',
        b'{"do": "subtract"}',
        b'{"do": "checkpoint"}',
        b'{"do": "sum"}',
    ]
}
"""Of each trainer that executes commands."""
SHORT = {"n_epochs": 1, "batch_size": 4}


def names(kind: str) -> list[Any]:
    """The names of one kind; those that need torch are marked."""
    return [pytest.param(name, marks=() if name in LIGHT else pytest.mark.ml) for name in INSTALLED.all(kind)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model."""
    from arbor_core.cli.main import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(folder)
    return folder


def base_model(name: str, request: pytest.FixtureRequest) -> str:
    return "mock/tiny" if name in LIGHT else str(request.getfixturevalue("tiny"))


@pytest.mark.parametrize("name", names("trainers"))
def test_trainer_conforms(name: str, chat_rows: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    if INSTALLED.get("trainers", name).input != "file":
        check_trainer(name, model=base_model(name, request), commands=COMMANDS.get(name))
    else:
        check_trainer(name, rows=chat_rows, model=base_model(name, request), hyperparameters=SHORT)


@pytest.mark.parametrize("name", names("inference_backends"))
def test_backend_conforms(name: str, request: pytest.FixtureRequest) -> None:
    check_backend(
        INSTALLED.get("inference_backends", name),
        base_model(name, request),
        options=defaults("backend", name),
        refuses=name not in LIGHT,
    )


@pytest.mark.parametrize("name", names("inference_backends"))
def test_backend_takes_policies(name: str, request: pytest.FixtureRequest) -> None:
    model = base_model(name, request)
    check_policies(
        INSTALLED.get("inference_backends", name),
        model,
        write_no_tensors if name in LIGHT else peft_writer(model),
        options=defaults("backend", name),
    )


def write_no_tensors(folder: Path) -> None:
    """An adapter for engines that have no model."""
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


def peft_writer(model: str) -> Callable[[Path], None]:
    """Writes a new adapter for a model."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    return adapted.save_pretrained  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", list(INSTALLED.all("schedulers")))
def test_scheduler_conforms(name: str) -> None:
    check_scheduler(INSTALLED.get("schedulers", name))


@pytest.mark.parametrize("name", list(INSTALLED.all("allocators")))
def test_allocator_conforms(name: str) -> None:
    factory = INSTALLED.get("allocators", name)
    check_allocator(lambda: factory(AllocatorSettings(None, None)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=(pytest.mark.ml, pytest.mark.slow) if name == "torchrun" else ()) for name in LAUNCHERS],
)
def test_launcher_conforms(name: str) -> None:
    check_launcher(name)


TRAINS_ON = {"trainer": "mock", "model": "mock/tiny", "hyperparameters": {"steps": 9999, "step_seconds": 0.05}}


@pytest.mark.parametrize("name", sorted(INSTALLED.all("executors").keys() - {"mock_node"}))  # it has a test of its own
def test_executor_conforms(name: str, chat_rows: list[dict[str, Any]]) -> None:
    check_executor(INSTALLED.get("executors", name), rows=chat_rows, **TRAINS_ON, outlive=name != "mock")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit waits no longer than this for what a bad executor never does."""
    monkeypatch.setattr(executor_checks, "PATIENCE_SECONDS", 1.5)


@pytest.fixture
def site(chat_rows: list[dict[str, Any]], tmp_path: Path) -> executor_checks.Site:
    """Attempts without processes, under an executor that a test may spoil."""

    def job(name: str) -> JobDirectory:
        config = {"steps": 9999, "step_seconds": 0.05}
        return JobDirectory(tmp_path / name, "mock", chat_rows, "mock/tiny", config)

    return executor_checks.Site(INSTALLED.get("executors", "mock"), ExecutorSettings("cold", tmp_path / "run"), job)


async def test_the_kit_finds_an_executor_that_forgets_who_lives(site: executor_checks.Site) -> None:
    refs = [await site.start(site.prepared(name)) for name in ("a", "b")]
    poll = site.executor.poll
    site.executor.poll = lambda attempts: poll(dict(list(attempts.items())[:1]))  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="which live, and of 'a ref of another executor' it says"):
        await executor_checks.check_living(site, *refs)
    site.executor.poll = poll  # type: ignore[method-assign]
    await site.close()


@pytest.mark.usefixtures("impatient")
async def test_the_kit_finds_an_executor_that_sees_no_progress(site: executor_checks.Site) -> None:
    ref = await site.start(site.prepared("a"))
    poll = site.executor.poll

    async def frozen(attempts: Mapping[str, Path]) -> Mapping[str, str | None]:
        return dict.fromkeys(await poll(attempts), "lives")

    site.executor.poll = frozen  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="says something else of an attempt that has made progress"):
        await executor_checks.check_living(site, ref)
    await site.close()


@pytest.mark.usefixtures("impatient")
async def test_the_kit_finds_an_executor_that_lets_a_late_start_begin(site: executor_checks.Site) -> None:
    async def look(attempt_dir: Path) -> str | None:
        claim = AttemptDir(attempt_dir).supervisor
        return claim.read_text() if claim.exists() else None

    site.executor.adopt = look  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="an attempt that was given up before it was started does not live"):
        await executor_checks.check_never_begun(site)
    await site.close()


async def test_the_kit_finds_an_executor_that_ends_nothing(site: executor_checks.Site) -> None:
    async def end(ref: str) -> None:
        pass

    ref, real = await site.start(site.prepared("a")), site.executor.end
    site.executor.end = end  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="an attempt lives that was ended"):
        await executor_checks.check_ended(site, ref)
    site.executor.end = real  # type: ignore[method-assign]
    await site.close()


@pytest.mark.usefixtures("impatient")
async def test_the_kit_finds_an_executor_that_runs_an_attempt_twice(site: executor_checks.Site) -> None:
    attempt = site.prepared("a")
    ref, start = await site.start(attempt), site.executor.start

    async def again(order: AttemptOrder, placement: Placement) -> str:
        AttemptDir(order.dir).supervisor.unlink()
        return await start(order, placement)

    site.executor.start = again  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="an attempt that is run by somebody else does not live any more"):
        await executor_checks.check_started_twice(site, ref, attempt)
    await site.close()


class Loose(msgspec.Struct):
    steps: int


class WithDefault(msgspec.Struct, forbid_unknown_fields=True):
    n_epochs: Any
    batch_size: Any
    learning_rate_multiplier: Any
    learning_rate: Any
    steps: Any
    step_seconds: Any
    checkpoint_steps: Any
    resume_seconds: Any
    fault: Any
    fault_step: Any
    fault_times: int = 1


def test_the_kit_finds_keys_that_the_yaml_has_alone() -> None:
    with pytest.raises(AssertionError, match="has keys that Loose does not"):
        trainer_checks.check_config("mock", Trainer(Loose, "arbor_mock.train:train"))


def test_the_kit_finds_a_default_in_the_struct() -> None:
    with pytest.raises(AssertionError, match="has defaults"):
        trainer_checks.check_config("mock", Trainer(WithDefault, "arbor_mock.train:train"))


def test_the_kit_finds_a_function_that_is_not_there() -> None:
    with pytest.raises(AssertionError, match="defines no 'tarin'"):
        trainer_checks.check_functions(Trainer(Loose, "arbor_mock.train:tarin"))


@pytest.fixture
def learner(tmp_path: Path) -> Callable[..., JobDirectory]:
    """Makes jobs of the trainer mock_grpo with some hyperparameters."""

    def make(**values: Any) -> JobDirectory:
        return JobDirectory(tmp_path / "job", "mock_grpo", (), "mock/tiny", {**rollout_checks.SIZE, **values})

    return make


def test_the_kit_finds_a_trainer_that_dies_of_its_groups(learner: Callable[..., JobDirectory]) -> None:
    with pytest.raises(AssertionError, match="step 2, for which all groups were sent: the worker ended with status -9"):
        rollout_checks.check_to_the_end(learner(fault="crash", fault_step=1))


def test_the_kit_finds_a_trainer_that_skips_nothing(
    learner: Callable[..., JobDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_checks, "ATTEMPT_SECONDS", 3)
    with pytest.raises(AssertionError, match="a group that is too old is counted as handled: nothing of it"):
        rollout_checks.check_to_the_end(learner(max_group_age=9))


def test_the_kit_finds_steps_that_are_made_of_something_else(learner: Callable[..., JobDirectory]) -> None:
    job = learner()
    rollout_checks.check_to_the_end(job)
    honest, mine = job.events(MetricsEvent), job.events(MetricsEvent)
    fed = mine[1].fed
    assert fed
    mine[1].fed = msgspec.structs.replace(fed, groups=fed.groups[:-1])
    with pytest.raises(AssertionError, match="step 2 says it was made of"):
        rollout_checks.check_fed(job, mine)
    with pytest.raises(AssertionError, match="step 2 was made of"):
        report_checks.check_same(mine, honest)
    mine = job.events(MetricsEvent)
    mine[2].digest = "another"
    with pytest.raises(AssertionError, match="step 3: the digest of the parameters is another"):
        report_checks.check_same(mine, honest)
    with pytest.raises(AssertionError, match="the steps are"):
        report_checks.check_same(mine[1:], honest)


HASTY = """
import json
from arbor_core import JobStopped

def train(run):
    last = run.last_checkpoint()
    done = last.step if last else 0
    while run.desired() != "finish":
        for command in run.commands(done, 1.0):
            done = command.number
            {first}
            {second}
        for request in run.asked_checkpoints():
            save(run, done)
            run.name_checkpoint(request, done)
        try:
            run.stop_if_asked()
        except JobStopped:
            save(run, done)
            raise
    save(run, done)
    run.finish(run.last_checkpoint(), 1)

def save(run, done):
    last = run.last_checkpoint()
    if last is None or last.step < done:
        with run.checkpoint(done) as folder:
            (folder / "done").write_text(str(done))

class Policy:
    module = None

    def write(self, folder):
        (folder / "policy").write_text("x")
"""
SAVE, ANSWER = "save(run, done)", "run.result(command, b'done')"


@pytest.fixture
def executing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], JobDirectory]:
    """Makes a job whose trainer does two things with each command."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def make(first: str, second: str) -> JobDirectory:
        (tmp_path / "hasty.py").write_text(HASTY.format(first=first, second=second))
        job = JobDirectory(tmp_path / "job", "mock_commands", (), "mock/tiny")
        job.entry = "hasty:train"
        return job

    return make


def test_a_checkpoint_that_includes_a_command_without_a_result_is_an_error(
    executing: Callable[[str, str], JobDirectory],
) -> None:
    """Its client would wait for ever: the job says so instead."""
    job = executing(SAVE, "import os; os._exit(1)")
    job.command(1, b"")
    assert job.attempt() == 1
    job.ask("run")
    assert job.attempt() == 1
    (error,) = job.events(ErrorEvent)
    assert "goes on after command 1, and command 1 has no result" in error.message


def test_the_kit_finds_a_trainer_that_answers_too_little(executing: Callable[[str, str], JobDirectory]) -> None:
    job = executing(SAVE, f"{ANSWER} if done != 3 else None")
    with pytest.raises(AssertionError, match=r"results of \[1, 2\]"):
        command_checks.check_to_the_end(job, [b"1", b"2", b"3"])


def test_the_kit_says_what_a_trainer_that_cannot_be_paused_has_to_do(
    executing: Callable[[str, str], JobDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_checks, "STOP_SECONDS", 3)
    job = executing("run.stop_if_asked = lambda: None", ANSWER)
    with pytest.raises(AssertionError, match=r"asked to pause, the worker still runs .* call run\.stop_if_asked\(\)"):
        command_checks.check_resumed(job, [b"1", b"2", b"3"], {})


def test_the_kit_says_what_a_trainer_that_names_no_checkpoints_has_to_do(
    executing: Callable[[str, str], JobDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_checks, "STOP_SECONDS", 3)
    job = executing("run.asked_checkpoints = lambda: []", ANSWER)
    job.command(1, b"1")
    with rollout_checks.running(job) as attempt:
        command_checks.until_answered(attempt, 1)
        with pytest.raises(AssertionError, match=r"'first' \(of each run\.asked_checkpoints\(\) write one"):
            rollout_checks.check_named(attempt)


def test_the_kit_finds_a_trainer_that_answers_otherwise_when_it_was_killed(
    executing: Callable[[str, str], JobDirectory],
) -> None:
    job = executing("import os", "run.result(command, str(os.getpid()).encode())")
    with pytest.raises(AssertionError, match="after it was killed command 1 is answered"):
        command_checks.check_killed(job, [b"1", b"2", b"3"], {1: b"1", 2: b"2", 3: b"3"})


def test_the_kit_finds_a_trainer_that_does_not_send_its_policy_again(
    executing: Callable[[str, str], JobDirectory],
) -> None:
    job = executing("run.send_policy(done, Policy()) if done == 1 else None", f"{ANSWER}; {SAVE}")
    sent = [b"1", b"2", b"3", b"4"]
    with pytest.raises(AssertionError, match=r"sent the policies \[1\] and ended; the next one sent \[\]"):
        command_checks.check_killed(job, sent, dict.fromkeys(range(1, len(sent) + 1), b"done"))


FORGETFUL_TRAINER = """
def train(run):
    last = run.last_checkpoint()
    for step in range(({goes_on}) + 1, 5):
        run.metrics(step, 4, train_loss=1 / step + {loss})
        if step < 4:
            {write}
    run.write_checkpoint(4, write)
    run.finish(run.last_checkpoint(), 1)

def write(folder):
    (folder / "weights").write_text("x")
"""
GOOD = {"goes_on": "last.step if last else 0", "loss": "0", "write": "run.write_resume_point(step, write)"}


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Holds a trainer of four steps, with some fault, against the kit."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def check(**faults: str) -> None:
        def job(name: str) -> JobDirectory:
            made = JobDirectory(tmp_path / name, "mock", [], "mock/tiny")
            made.entry = "forgetful:train"
            return made

        (tmp_path / "forgetful.py").write_text(FORGETFUL_TRAINER.format(**{**GOOD, **faults}))
        whole, killed = job("whole"), job("killed")
        assert whole.attempt() == 0, whole.log
        resume_checks.check_killed(killed, whole, points=True)

    return check


def test_the_kit_takes_a_trainer_that_goes_on_from_its_resume_points(forgetful: Callable[..., None]) -> None:
    forgetful()


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"write": "pass"}, r"there are resume points of steps \[\] and checkpoints of \[\]; expected one of each"),
        ({"write": "run.write_checkpoint(step, write); run.write_resume_point(step, write)"}, "expected one of each"),
        ({"goes_on": "0"}, r"could go on after step 3, it made the steps \[1, 2, 3, 4\]"),
        ({"goes_on": "last.step + 1 if last else 0"}, r"could go on after step 3, it made the steps \[\]"),
        ({"loss": "(9 if last else 0)"}, "after it was killed"),
    ],
)
def test_the_kit_finds_a_trainer_that_resumes_wrongly(
    forgetful: Callable[..., None], faults: dict[str, str], message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        forgetful(**faults)


def test_the_kit_finds_resume_points_that_pile_up(forgetful: Callable[..., None]) -> None:
    copied = "import shutil; at = run.dir / 'resume'; shutil.copytree(at / f'{step}-1', at / f'{step}-0')"
    with pytest.raises(AssertionError, match="only the newest is kept"):
        forgetful(write=f"run.write_resume_point(step, write); {copied}")


def test_the_kit_finds_a_greedy_scheduler() -> None:
    class Greedy:
        def plan(self, snapshot: Snapshot) -> Plan:
            return Plan(start=tuple(job.id for job in snapshot.queued))

    with pytest.raises(AssertionError, match="that are free"):
        check_scheduler(Greedy)


def test_the_kit_finds_a_scheduler_that_adds_up_what_is_free_on_all_nodes() -> None:
    class OneMachine:
        """The first job alone, if it fits into the sum."""

        def plan(self, snapshot: Snapshot) -> Plan:
            first = snapshot.queued[:1]
            return Plan(tuple(job.id for job in first if job.claim.bundles[0].count <= snapshot.free["train"]))

    with pytest.raises(AssertionError, match=r"no node has enough .*see Snapshot\.free_by_node"):
        check_scheduler(OneMachine)


def test_the_kit_finds_a_scheduler_that_does_nothing() -> None:
    class Idle:
        def plan(self, snapshot: Snapshot) -> Plan:
            return Plan()

    with pytest.raises(AssertionError, match="not started"):
        check_scheduler(Idle)
