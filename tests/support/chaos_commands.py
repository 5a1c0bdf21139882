"""A client that has one job execute commands in the chaos: it sends them out of order and twice, hangs up, follows the
results, gets them again, and acknowledges them.

What each command must answer is known from the commands before it. What the client was told is compared with what is
left at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chaos_checks import read
from chaos_jobs import REFUSED_LATE, RETRY_SECONDS, JobClient
from http_calls import JOBS, Answer
from live import ENDED

from arbor_core.jobdir import inbox, results
from arbor_core.storage import synced_log

if TYPE_CHECKING:
    from chaos_clients import Clients, Kind

EXECUTING: list[Kind] = [
    ("mock_commands", {"step_seconds": 0.02, "checkpoint_commands": 7}),
    ("mock_commands", {"step_seconds": 0.0}),
]
COMMANDS = (40, 160)
"""A client sends so many at least and at most."""
AHEAD = 40
"""How many it sends before it has acknowledged results."""
AGAIN = (409, 429, 507)
"""Answers after which it sends the same again."""


@dataclass
class Outcome:
    """What the server has told of a job's commands."""

    taken: set[int] = field(default_factory=set)
    """Commands that the server has acknowledged."""
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    acknowledged: int = 0
    """The number up to which the server knows that results were got."""
    ended: str = ""
    """How the job has ended."""


class CommandClient(JobClient):
    """Sends commands until there are enough of them or `hurry` is set, then has the job finish."""

    def __init__(self, clients: Clients, job_id: str, seed: int) -> None:
        super().__init__(clients, job_id, seed)
        self.path = f"/v1/mock/jobs/{job_id}"
        self.most = self.draw.randint(*COMMANDS)
        self.sent: list[dict[str, Any]] = []
        """Commands that the server may have, from the first on."""
        self.answers: list[dict[str, Any]] = []
        """What each must answer."""
        self.sum = 0
        self.told = Outcome()

    def work(self) -> None:
        while not self.told.ended:
            answer = self.clients.ask("GET", f"{JOBS}/{self.job_id}")
            if answer is None or answer.status != 200:
                self.rest.wait(RETRY_SECONDS)
            elif answer.json["status"] in ENDED:
                self.told.ended = answer.json["status"]
            elif self.told.results and (self.hurry.is_set() or len(self.sent) >= self.most):
                self.clients.ask("POST", f"{self.path}/finish")
                self.follow()
            else:
                self.act()
        while self.follow():
            pass
        self.acknowledge(len(self.told.results))

    def act(self) -> None:
        manner = self.draw.random()
        enough = self.hurry.is_set() and self.sent
        if manner < 0.5 and len(self.sent) - self.told.acknowledged < AHEAD and not enough:
            self.send_some()
        elif manner < 0.6:
            self.get_again()
        elif manner < 0.7 and self.told.results:
            self.acknowledge(self.draw.randint(0, len(self.told.results)))
        else:
            self.follow()

    # --- commands -----------------------------------------------------------------------------------------------------

    def send_some(self) -> None:
        """Some commands, in any order, now and then one that was sent before."""
        first = len(self.sent) + 1
        for number in range(first, first + self.draw.randint(1, 6)):
            self.plan(number)
        numbers = list(range(first, len(self.sent) + 1))
        self.draw.shuffle(numbers)
        numbers += self.draw.choices(range(1, len(self.sent) + 1), k=self.draw.randint(0, 2))
        for number in numbers:
            self.send(number)

    def plan(self, number: int) -> None:
        """Think of a command, and of what it must answer."""
        do = self.draw.choices(("add", "sum", "checkpoint", "publish"), (8, 2, 1, 1))[0]
        n = self.draw.randint(-9, 9) if do == "add" else 0
        self.sum += n
        said = {"checkpoint": {"step": number - 1}, "publish": {"version": number}}.get(do, {"sum": self.sum})
        self.sent.append({"number": number, "do": do, "n": n})
        self.answers.append({"number": number, **said})

    def send(self, number: int) -> None:
        """Send a command until somebody says what became of it."""
        if self.draw.random() < 0.1:
            self.hang_up(f"{self.path}/commands", self.sent[number - 1])
        answer = self.post("commands", self.sent[number - 1], late=("command_acknowledged",))
        if answer is None:
            return
        if number in self.told.taken and not answer["repeated"]:
            self.fault(f"command {number} was taken twice")
        self.clients.counts["commands taken"] += not answer["repeated"]
        self.told.taken.add(number)

    def post(self, path: str, body: dict[str, Any], late: tuple[str, ...] = ()) -> dict[str, Any] | None:
        """The answer, however often it takes; None: it comes too late."""
        while True:
            answer = self.clients.ask("POST", f"{self.path}/{path}", body)
            if answer and answer.status == 200:
                return dict(answer.json)
            if answer and answer.status not in AGAIN:
                if answer.json["error"]["code"] not in (REFUSED_LATE, *late):
                    self.fault(f"{path} {body} was answered {answer.status}: {answer.body[:300]!r}")
                return None
            if answer and answer.status == 429 and not self.follow():  # so many results wait
                self.acknowledge(len(self.told.results))
            self.rest.wait(RETRY_SECONDS)

    # --- results ------------------------------------------------------------------------------------------------------

    def follow(self) -> bool:
        """Get the results that follow those that are known; whether there may be more."""
        data = self.results_after(len(self.told.results), seconds=0.3)
        for result in data or ():
            number = len(self.told.results) + 1
            self.told.results[number] = result
            self.clients.counts["results got"] += 1
            if number > len(self.answers) or result != self.answers[number - 1]:
                wanted = self.answers[number - 1 : number]
                self.fault(f"the result of command {number} is {result}, and not {wanted}")
        return data is None or bool(data)

    def get_again(self) -> None:
        """What was told once is told again as it was."""
        if self.told.acknowledged == len(self.told.results):
            return
        after = self.draw.randint(self.told.acknowledged, len(self.told.results) - 1)
        data = self.results_after(after)
        known = [self.told.results[number] for number in range(after + 1, len(self.told.results) + 1)]
        if data is not None and data[: len(known)] != known:
            self.fault(f"the results after {after} were {known}, and are {data}")

    def results_after(self, after: int, seconds: float = 0.0) -> list[dict[str, Any]] | None:
        """None: nobody knows now."""
        answer: Answer | None = self.clients.ask("GET", f"{self.path}/results?after={after}&seconds={seconds}")
        if answer and answer.status == 200:
            return list(answer.json["data"])
        if answer and answer.status not in AGAIN:
            self.fault(f"results after {after}: {answer.status}: {answer.body[:300]!r}")
        self.rest.wait(RETRY_SECONDS)
        return None

    def acknowledge(self, up_to: int) -> None:
        answer = self.post("acknowledge", {"up_to": up_to})
        if answer is None:
            return
        self.told.acknowledged = max(self.told.acknowledged, up_to)
        self.clients.counts["acknowledgements"] += 1
        if answer["acknowledged"] != self.told.acknowledged:
            self.fault(f"{answer['acknowledged']} results are acknowledged, and not {self.told.acknowledged}")

    # --- afterwards ---------------------------------------------------------------------------------------------------

    def violations(self, storage: Path) -> Iterator[str]:
        yield from (f"{self.job_id}: {text}" for text in self._violations(storage))

    def _violations(self, storage: Path) -> Iterator[str]:
        told, folder = self.told, storage / "jobs" / self.job_id
        if told.ended == "succeeded" and (missing := told.taken - told.results.keys()):
            yield f"commands {sorted(missing)} were taken, and have no result"
        there = Counter(place.number for place in inbox.places(folder / "inbox"))
        if lost := [number for number in told.taken if there[number] != 1]:
            yield f"commands {lost} were taken, and are not in the inbox once"
        if unknown := there.keys() - set(range(1, len(self.sent) + 1)):
            yield f"commands {sorted(unknown)} are in the inbox, and nobody has sent them"
        places = list(results.readable(folder / "results", 0))
        twice = [number for number, count in Counter(place.number for place in places).items() if count > 1]
        if twice:
            yield f"commands {twice} have two results"
        if (known := results.acknowledged(folder / "results")) < told.acknowledged:
            yield f"{told.acknowledged} results were acknowledged, and {known} are"
        end = places[-1].end if places else 0
        needed = min((place.start for place in places if place.number > known), default=end)
        segments = synced_log.segments(folder / "results")
        if len(segments) > 1 and segments[1][0] <= needed:
            yield f"results up to {known} were acknowledged, and are kept: {segments}, {needed} is needed"
        sql = "SELECT message FROM events WHERE job_id=? AND message LIKE '%with another result%'"
        yield from (message for (message,) in read(storage, sql, self.job_id))
        self.clients.counts["jobs on commands checked"] += 1
