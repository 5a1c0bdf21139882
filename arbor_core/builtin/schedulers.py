"""The schedulers `fifo`: first come, first served, and `priority`: the most urgent job first, preempting others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice

from arbor_core.types import Plan, QueuedJob, RunningJob, Snapshot, placements

STARTS_PER_POINT = 10
"""A queued job gains one point of priority for as many attempts of other jobs that are started."""
PLACEMENTS = 200
"""How many ways to place a job are looked at to find the jobs to preempt for it."""

Places = Counter[tuple[str, str]]
"""Numbers of devices by pool and node."""


class FifoScheduler:
    """Starts jobs in the order of arrival.

    A job that does not fit holds back those behind it, so small jobs never starve a large one.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = snapshot.places()
        start: list[str] = []
        for job in sorted(snapshot.queued, key=lambda job: job.seq):
            needed = next(placements(job.claim, free), None)
            if needed is None:
                break
            free.subtract(needed)
            start.append(job.id)
        return Plan(start=tuple(start))


class PriorityScheduler:
    """Starts jobs in the order of their urgency, and of arrival among equals; preempts less urgent ones for them.

    A job's urgency is its priority and one point for every `STARTS_PER_POINT` attempts that were started while it was
    queued: only jobs that arrive within a bounded number of starts can go before it. It keeps its points when it runs.

    A job that does not fit holds back those behind it. It takes the devices of running jobs whose priority and urgency
    are both lower, if those are enough on one node, together with the devices that will soon be free there anyway. Of
    these jobs it takes the least urgent, then as few as possible, then the youngest. So ageing lets a job go first, and
    never preempts another.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = snapshot.places()
        soon = snapshot.places()
        """Free once the jobs that stop have stopped, less what jobs before in the order take."""
        for job in snapshot.running:
            if job.stopping:
                soon.update(job.held())
        staying = [job for job in snapshot.running if not job.stopping]
        start: list[str] = []
        preempt: list[str] = []
        held_back = False
        for job_to_start in sorted(snapshot.queued, key=lambda job: (-urgency(job), job.seq)):
            needed = None if held_back else next(placements(job_to_start.claim, free), None)
            if needed is not None:
                free.subtract(needed)
                start.append(job_to_start.id)
            else:
                held_back = True
                found = jobs_to_preempt(job_to_start, soon, staying)
                if found is None:
                    break  # those behind wait for this one
                preempted, needed = found
                for job in preempted:
                    soon.update(job.held())
                    staying.remove(job)
                    preempt.append(job.id)
            soon.subtract(needed)
        return Plan(tuple(start), tuple(preempt))


def jobs_to_preempt(
    job_to_start: QueuedJob, soon: Places, running: Iterable[RunningJob]
) -> tuple[list[RunningJob], Places] | None:
    """The running jobs that make room for one beside what is free soon, and the devices that it gets then; None: those
    that may be preempted have too few on any node."""
    if (needed := next(placements(job_to_start.claim, soon), None)) is not None:
        return [], needed
    lower = [job for job in running if job.priority < job_to_start.priority and urgency(job) < urgency(job_to_start)]
    for bound in sorted({urgency(job) for job in lower}):
        allowed = [job for job in lower if urgency(job) <= bound]
        room = Counter(soon)
        for job in allowed:
            room.update(job.held())
        found = islice(placements(job_to_start.claim, room), PLACEMENTS)
        ways = [(fewest(allowed, needed - soon), needed) for needed in found]
        if ways:
            return min(ways, key=lambda way: (len(way[0]), sorted((urgency(job), -job.seq) for job in way[0])))
    return None


def fewest(allowed: list[RunningJob], missing: Mapping[tuple[str, str], int]) -> list[RunningJob]:
    """Those of `allowed` to preempt: the largest first, of equals the least urgent, of these the youngest."""
    chosen: list[RunningJob] = []
    for job in sorted(allowed, key=lambda job: (-contribution(job, missing), urgency(job), -job.seq)):
        if cover(chosen, missing):
            break
        chosen.append(job)
    for job in list(chosen):  # a later one may have made an earlier one superfluous
        others = [other for other in chosen if other is not job]
        if cover(others, missing):
            chosen = others
    return chosen


def cover(jobs: Iterable[RunningJob], missing: Mapping[tuple[str, str], int]) -> bool:
    """Whether these jobs together hold the missing devices."""
    held: Places = Counter()
    for job in jobs:
        held.update(job.held())
    return all(count <= held[place] for place, count in missing.items())


def contribution(job: RunningJob, missing: Mapping[tuple[str, str], int]) -> int:
    """How many of the missing devices a job holds."""
    held = job.held()
    return sum(min(count, held[place]) for place, count in missing.items())


def urgency(job: QueuedJob | RunningJob) -> int:
    """A job's priority, and its points for waiting."""
    return job.priority + job.waited // STARTS_PER_POINT
