"""The schedulers `fifo`: first come, first served, and `priority`: the most urgent job first, preempting others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from arbor_core.types import Plan, QueuedJob, RunningJob, Snapshot, devices_by_pool

STARTS_PER_POINT = 10
"""A queued job gains one point of priority for as many attempts of other jobs that are started."""


class FifoScheduler:
    """Starts jobs in the order of arrival.

    A job that does not fit holds back those behind it, so small jobs never starve a large one.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = Counter(snapshot.free)
        start: list[str] = []
        for job in sorted(snapshot.queued, key=lambda job: job.seq):
            needed = devices_by_pool(job.claim)
            if not fits(needed, free):
                break
            free.subtract(needed)
            start.append(job.id)
        return Plan(start=tuple(start))


class PriorityScheduler:
    """Starts jobs in the order of their urgency, and of arrival among equals; preempts less urgent ones for them.

    A job's urgency is its priority and one point for every `STARTS_PER_POINT` attempts that were started while it was
    queued: only jobs that arrive within a bounded number of starts can go before it. It keeps its points when it runs.

    A job that does not fit holds back those behind it. It takes the devices of running jobs whose priority and urgency
    are both lower, if those are enough together with the devices that will soon be free anyway. Of these jobs it takes
    the least urgent, then as few as possible, then the youngest. So ageing lets a job go first, and never preempts
    another.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = Counter(snapshot.free)
        soon = Counter(snapshot.free)
        """Free once the jobs that stop have stopped, less what jobs before in the order take."""
        for job in snapshot.running:
            if job.stopping:
                soon.update(devices_by_pool(job.claim))
        staying = [job for job in snapshot.running if not job.stopping]
        start: list[str] = []
        preempt: list[str] = []
        held_back = False
        for job_to_start in sorted(snapshot.queued, key=lambda job: (-urgency(job), job.seq)):
            needed = devices_by_pool(job_to_start.claim)
            if not held_back and fits(needed, free):
                free.subtract(needed)
                start.append(job_to_start.id)
            else:
                held_back = True
                missing = {pool: count - soon[pool] for pool, count in needed.items() if count > soon[pool]}
                preempted = jobs_to_preempt(job_to_start, missing, staying)
                if preempted is None:
                    break  # those behind wait for this one
                for job in preempted:
                    soon.update(devices_by_pool(job.claim))
                    staying.remove(job)
                    preempt.append(job.id)
            soon.subtract(needed)
        return Plan(tuple(start), tuple(preempt))


def jobs_to_preempt(
    job_to_start: QueuedJob, missing: Mapping[str, int], running: Iterable[RunningJob]
) -> list[RunningJob] | None:
    """The running jobs that make the missing devices free; None: those that may be preempted have too few."""
    if not missing:
        return []
    lower = [job for job in running if job.priority < job_to_start.priority and urgency(job) < urgency(job_to_start)]
    for bound in sorted({urgency(job) for job in lower}):
        allowed = [job for job in lower if urgency(job) <= bound]
        if cover(allowed, missing):
            return fewest(allowed, missing)
    return None


def fewest(allowed: list[RunningJob], missing: Mapping[str, int]) -> list[RunningJob]:
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


def cover(jobs: Iterable[RunningJob], missing: Mapping[str, int]) -> bool:
    """Whether these jobs together hold the missing devices."""
    held: Counter[str] = Counter()
    for job in jobs:
        held.update(devices_by_pool(job.claim))
    return fits(missing, held)


def contribution(job: RunningJob, missing: Mapping[str, int]) -> int:
    """How many of the missing devices a job holds."""
    held = devices_by_pool(job.claim)
    return sum(min(count, held.get(pool, 0)) for pool, count in missing.items())


def urgency(job: QueuedJob | RunningJob) -> int:
    """A job's priority, and its points for waiting."""
    return job.priority + job.waited // STARTS_PER_POINT


def fits(needed: Mapping[str, int], free: Mapping[str, int]) -> bool:
    """Whether each pool has enough free devices."""
    return all(count <= free.get(pool, 0) for pool, count in needed.items())
