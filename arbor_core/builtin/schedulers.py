"""The schedulers `fifo`: first come, first served, and `priority`: the most urgent first, pausing others if need be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arbor_core.types import Plan, QueuedJob, RunningJob, Snapshot, devices_by_pool

STARTS_PER_POINT = 10
"""A queued job moves up by one point of priority whenever so many attempts of others have been started."""


class FifoScheduler:
    """Starts jobs in the order of arrival.

    A job that does not fit holds back those behind it, so a large job is never starved by small ones.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = dict(snapshot.free)
        start: list[str] = []
        for job in sorted(snapshot.queued, key=lambda job: job.seq):
            wanted = devices_by_pool(job.claim)
            if not fits(wanted, free):
                break
            take(wanted, free)
            start.append(job.id)
        return Plan(start=tuple(start))


class PriorityScheduler:
    """Starts jobs in the order of their rank, and of arrival within a rank; pauses less urgent ones to make room.

    A job's rank is its priority and one point for every `STARTS_PER_POINT` attempts that were started while it was
    queued: only jobs that arrive within a bounded number of starts can go before it. It keeps its points when it runs.

    A job that does not fit holds back those behind it. It takes the devices of running jobs whose priority and rank are
    both lower, if those are enough together with what is about to be given back: first of all none of a higher rank
    than it must, then as few as possible, then the youngest. So ageing lets a job go first, and never pauses another.
    """

    def plan(self, snapshot: Snapshot) -> Plan:
        free = dict(snapshot.free)
        soon = dict(snapshot.free)  # what is free once those that stop have stopped
        for job in snapshot.running:
            if job.stopping:
                give(devices_by_pool(job.claim), soon)
        staying = [job for job in snapshot.running if not job.stopping]
        start: list[str] = []
        preempt: list[str] = []
        held_back = False
        for waiting in sorted(snapshot.queued, key=lambda job: (-rank(job), job.seq)):
            wanted = devices_by_pool(waiting.claim)
            if not held_back and fits(wanted, free):
                take(wanted, free)
                start.append(waiting.id)
            else:
                held_back = True
                lacking = {pool: count - soon.get(pool, 0) for pool, count in wanted.items()}
                missing = {pool: count for pool, count in lacking.items() if count > 0}
                paused = victims(waiting, missing, staying)
                if paused is None:
                    break  # those behind wait for this one
                for job in paused:
                    give(devices_by_pool(job.claim), soon)
                    staying.remove(job)
                    preempt.append(job.id)
            take(wanted, soon)
        return Plan(tuple(start), tuple(preempt))


def victims(waiting: QueuedJob, missing: Mapping[str, int], running: Iterable[RunningJob]) -> list[RunningJob] | None:
    """The running jobs to pause so that what is missing comes free; None if that cannot be."""
    if not missing:
        return []
    lower = [job for job in running if job.priority < waiting.priority and rank(job) < rank(waiting)]
    for bound in sorted({rank(job) for job in lower}):
        allowed = [job for job in lower if rank(job) <= bound]
        if covered(missing, allowed):
            return fewest(missing, allowed)
    return None


def fewest(missing: Mapping[str, int], allowed: list[RunningJob]) -> list[RunningJob]:
    """Those of `allowed` that free what is missing: the largest, of these the lowest, of these the youngest."""
    chosen: list[RunningJob] = []
    for job in sorted(allowed, key=lambda job: (-useful(job, missing), rank(job), -job.seq)):
        if covered(missing, chosen):
            break
        chosen.append(job)
    for job in list(chosen):  # a later one may have made an earlier one needless
        others = [other for other in chosen if other is not job]
        if covered(missing, others):
            chosen = others
    return chosen


def covered(missing: Mapping[str, int], jobs: Iterable[RunningJob]) -> bool:
    """Whether these jobs hold what is missing."""
    freed: dict[str, int] = {}
    for job in jobs:
        give(devices_by_pool(job.claim), freed)
    return fits(missing, freed)


def useful(job: RunningJob, missing: Mapping[str, int]) -> int:
    """How many of the missing devices a job holds."""
    held = devices_by_pool(job.claim)
    return sum(min(count, held.get(pool, 0)) for pool, count in missing.items())


def rank(job: QueuedJob | RunningJob) -> int:
    """How urgent a job is by now."""
    return job.priority + job.waited // STARTS_PER_POINT


def fits(wanted: Mapping[str, int], free: Mapping[str, int]) -> bool:
    return all(count <= free.get(pool, 0) for pool, count in wanted.items())


def take(wanted: Mapping[str, int], free: dict[str, int]) -> None:
    for pool, count in wanted.items():
        free[pool] -= count


def give(freed: Mapping[str, int], free: dict[str, int]) -> None:
    for pool, count in freed.items():
        free[pool] = free.get(pool, 0) + count
