"""Jobs against a pure model: whatever is asked of them, and whoever is killed meanwhile, they end where the model says.

One server with one device is used by all examples; killing it and starting it again is a rule. `STATE_EXAMPLES=200`
looks longer and elsewhere each time (`make chaos` does).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos_checks import supervisors
from http_calls import JOBS, Answer, call
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule
from live import LiveServer, launch

from arbor_core.testing.invariants import Seen, check_invariants

EXAMPLES = int(os.environ.get("STATE_EXAMPLES", "0"))
LONG = {"steps": 100_000, "step_seconds": 0.02, "checkpoint_steps": 20}
SHORT = {"steps": 6, "step_seconds": 0.02, "checkpoint_steps": 2}
DESIRED = {"cancel": "cancel", "pause": "pause", "resume": "run"}


@dataclass
class Job:
    """What the model knows of a job: what was asked of it last, and the end that was seen."""

    id: str
    short: bool
    desired: str = "run"
    ended: str | None = None

    def may_be(self) -> set[str]:
        """Where it is once all is quiet; a short job may have succeeded before it heard what was asked."""
        if self.ended:
            return {self.ended}
        quiet = {"cancel": {"cancelled"}, "pause": {"paused"}, "run": {"queued", "running"}}[self.desired]
        return quiet | ({"succeeded"} if self.short else set())

    def asked(self, word: str) -> str:
        """What is wanted of it after an answer 200: who cancelled cannot take it back."""
        return "cancel" if self.desired == "cancel" else DESIRED[word]


class World:
    """The server that all examples share."""

    server: LiveServer
    seen: Seen
    rows: str

    def start(self, folder: Path) -> None:
        self.server = launch(folder, "gpu.train=[0]", "limits.attempts=1000")

    def restart(self, number: int) -> None:
        self.server.stop(number)
        self.start(self.server.storage.parent)

    def column(self, job_id: str, name: str) -> str:
        with contextlib.closing(sqlite3.connect(self.server.storage / "arbor.db")) as db:
            return str(db.execute(f"SELECT {name} FROM jobs WHERE id=?", (job_id,)).fetchone()[0])

    def leases(self) -> int:
        with contextlib.closing(sqlite3.connect(self.server.storage / "arbor.db")) as db:
            return int(db.execute("SELECT count(*) FROM leases").fetchone()[0])


WORLD = World()


class JobsMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Job] = []

    def ask(self, job: Job, word: str) -> Answer:
        return call(WORLD.server.url, "POST", f"{JOBS}/{job.id}/{word}")

    def heard(self, job: Job, word: str, answer: Answer) -> None:
        """Compare an answer with rows 96 to 102 of the table, and note what was acknowledged."""
        if answer.status == 400:
            answer.error(400, "invalid_job_state")
            status = call(WORLD.server.url, "GET", f"{JOBS}/{job.id}").json["status"]
            assert status in ({"succeeded", "cancelled"} & job.may_be()), f"{word} was refused, yet it is {status}"
            assert (word, status) != ("cancel", "cancelled")
            job.ended = status
            return
        assert answer.status == 200, answer.body
        before, status = job.ended, answer.json["status"]
        if before:
            assert (word, before, status) == ("cancel", "cancelled", "cancelled"), f"{word} of {before}: {status}"
            return
        job.desired = job.asked(word)
        if status in ("succeeded", "failed", "cancelled"):
            assert status in job.may_be()
            job.ended = status

    def statuses(self) -> dict[str, str]:
        page = call(WORLD.server.url, "GET", f"{JOBS}?limit=100").json["data"]
        return {job["id"]: job["status"] for job in page}

    def quiet(self) -> bool:
        """Whether every job is where the model says, and the device is used if somebody wants it."""
        found = self.statuses()
        if any(found[job.id] not in job.may_be() for job in self.known):
            return False
        wants = any(job.desired == "run" and found[job.id] in ("queued", "running") for job in self.known)
        running = sum(status == "running" for status in found.values())
        return running == wants and WORLD.leases() == running

    # --- what happens -------------------------------------------------------------------------------------------------

    @initialize(target=jobs)
    def first(self) -> Job:
        return self.create(short=False)

    @rule(target=jobs, short=st.booleans())
    def create(self, short: bool) -> Job:
        method = {"type": "mock", "mock": {"hyperparameters": SHORT if short else LONG}}
        body = {"model": "mock/tiny", "training_file": WORLD.rows, "seed": 1, "method": method}
        job = Job(call(WORLD.server.url, "POST", JOBS, body).json["id"], short)
        self.known.append(job)
        return job

    @rule(job=jobs, word=st.sampled_from(["cancel", "pause", "pause", "resume", "resume"]))
    def ask_for(self, job: Job, word: str) -> None:
        self.heard(job, word, self.ask(job, word))

    @rule(job=jobs, words=st.lists(st.sampled_from(sorted(DESIRED)), min_size=2, max_size=3))
    def ask_at_once(self, job: Job, words: list[str]) -> None:
        """Of requests that race, one is the last: what is wanted then is what one of them asked, or the cancel."""
        if job.ended:
            return
        answers: dict[int, Answer] = {}

        def send(number: int) -> None:
            answers[number] = self.ask(job, words[number])

        threads = [threading.Thread(target=send, args=(number,)) for number in range(len(words))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted = {DESIRED[word] for number, word in enumerate(words) if answers[number].status == 200}
        desired = WORLD.column(job.id, "desired")
        assert all(answer.status in (200, 400) for answer in answers.values())
        if job.desired == "cancel" or "cancel" in wanted:
            assert desired == "cancel"
        elif wanted:
            assert desired in wanted
        job.desired = desired

    @rule(job=jobs, word=st.sampled_from(sorted(DESIRED)), seconds=st.floats(0, 0.02))
    def kill_the_server_while_it_answers(self, job: Job, word: str, seconds: float) -> None:
        """An answer that came is true after the restart; without one, it was done or it was not."""
        answers: list[Answer] = []

        def send() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                answers.append(self.ask(job, word))

        thread = threading.Thread(target=send)
        thread.start()
        time.sleep(seconds)
        WORLD.server.process.kill()
        thread.join()
        WORLD.restart(signal.SIGKILL)
        if answers and not (answers[0].status == 400 and not job.ended):
            self.heard(job, word, answers[0])
        if not job.ended:
            desired = WORLD.column(job.id, "desired")
            assert desired in ({job.desired} if answers else {job.desired, job.asked(word)})
            job.desired = desired

    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGTERM]))
    def restart(self, number: signal.Signals) -> None:
        WORLD.restart(number)

    @rule()
    def kill_a_trainer(self) -> None:
        for supervisor in supervisors(WORLD.server.storage):
            with contextlib.suppress(ProcessLookupError):
                os.kill(supervisor, signal.SIGKILL)

    @rule()
    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while not self.quiet():
            assert time.monotonic() < deadline, f"{self.known} came to {self.statuses()}\n{WORLD.server.log[-3000:]}"
            time.sleep(0.05)
        for job in self.known:
            if (status := self.statuses()[job.id]) in ("succeeded", "cancelled"):
                job.ended = status

    @invariant()
    def what_was_told_stays(self) -> None:
        WORLD.seen.look()

    def teardown(self) -> None:
        for job in self.known:
            self.heard(job, "cancel", self.ask(job, "cancel"))
        self.wait()
        for job in self.known:
            assert job.ended
            assert terminal_events(job.id) == [job.ended], f"{job} was told to have ended as {terminal_events(job.id)}"
        check_invariants(WORLD.server.storage, ended=False)


def terminal_events(job_id: str) -> list[str]:
    """The ends that a job's followers were told of: one, whatever raced."""
    ends = {f"Fine-tuning job {job_id} cancelled": "cancelled", "The job has successfully completed": "succeeded"}
    with contextlib.closing(sqlite3.connect(WORLD.server.storage / "arbor.db")) as db:
        rows = db.execute("SELECT message FROM events WHERE job_id=? ORDER BY seq", (job_id,)).fetchall()
    return [ends[text] for (text,) in rows if text in ends]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        WORLD.start(Path(folder))
        WORLD.seen = Seen(WORLD.server.storage)
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        WORLD.rows = WORLD.server.upload([row] * 12)
        yield
        WORLD.server.stop()


TestJobs = JobsMachine.TestCase
TestJobs.settings = settings(
    max_examples=EXAMPLES or 8,
    stateful_step_count=10,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
TestJobs.pytestmark = pytest.mark.timeout(7200 if EXAMPLES else 900)
