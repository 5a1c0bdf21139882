"""`check_executor`: attempts are started once, seen to live and to make progress, found again by the next server, and
ended."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from arbor_core.jobdir.documents import read_exit, read_order, read_placement
from arbor_core.jobdir.layout import AttemptDir
from arbor_core.storage.event_log import tail
from arbor_core.types import Device, Executor, ExecutorFactory, ExecutorSettings, MetricsEvent

from .hardware import device
from .job_directory import JobDirectory

T = TypeVar("T")
PATIENCE_SECONDS = 120.0
LOOK_SECONDS = 0.05
SILENCE_SECONDS = 1.0
"""How long to look whether an attempt that was ended still writes; its steps are much shorter."""
FOREIGN = "a ref of another executor"


def check_executor(
    factory: ExecutorFactory,
    *,
    trainer: str,
    rows: Sequence[Mapping[str, Any]],
    model: str,
    hyperparameters: Mapping[str, Any],
    devices: tuple[Device, ...] | None = None,
    outlive: bool = True,
) -> None:
    """Check an executor with attempts that really train.

    All that live are told in one call and others are not, also to the next server; who makes progress is seen to; an
    attempt that is started twice runs once, and one that was given up before it had begun never begins; signals reach
    it, and when it was ended nothing of it writes any more.

    Args:
        factory: As the plugin's hook returns it.
        trainer: An installed trainer on files that the executor can run.
        rows: Its training rows.
        model: Its base model.
        hyperparameters: With these a step takes about a twentieth of a second, and a job longer than this check.
        devices: What the attempts get; default: the one that tests run on.
        outlive: Attempts outlive the server. False: they end with it, as a simulation's may.

    Raises:
        AssertionError: what was expected.
    """
    with tempfile.TemporaryDirectory() as folder:

        def job(name: str) -> JobDirectory:
            path = Path(folder) / "jobs" / name
            return JobDirectory(
                path, trainer, rows, model, hyperparameters, devices=(device(),) if devices is None else devices
            )

        asyncio.run(_check(Site(factory, ExecutorSettings("cold", Path(folder) / "run"), job), outlive))


@dataclass
class Site:
    """An executor and what was started with it."""

    factory: ExecutorFactory
    settings: ExecutorSettings
    job: Callable[[str], JobDirectory]
    executor: Executor = field(init=False)
    started: dict[str, AttemptDir] = field(default_factory=dict)
    """By ref."""

    def __post_init__(self) -> None:
        self.executor = self.factory(self.settings)

    def prepared(self, name: str) -> AttemptDir:
        """The first attempt of a new job, which is not started yet."""
        return AttemptDir(self.job(name).prepare())

    async def start(self, attempt: AttemptDir) -> str:
        ref = await _soon(self.executor.start(read_order(attempt), read_placement(attempt)), "start")
        self.started[ref] = attempt
        return ref

    async def poll(self, *refs: str) -> Mapping[str, str | None]:
        """What the executor says of these attempts, or else of all."""
        asked = {ref: self.started[ref].path for ref in refs or self.started}
        return await _soon(self.executor.poll(asked), "poll")

    async def adopt(self, attempt: AttemptDir) -> str | None:
        return await _soon(self.executor.adopt(attempt.path), "adopt")

    async def gone(self, ref: str, why: str) -> None:
        """Wait until an attempt does not live any more."""
        await _until(lambda: self._absent(ref), f"an attempt that {why} does not live any more")

    async def _absent(self, ref: str) -> bool:
        return ref not in await self.poll(ref)

    async def progress(self, ref: str, since: str | None = None) -> str | None:
        """Wait until an attempt has made progress, or more than that; what the executor says then."""

        async def advanced() -> bool:
            living = await self.poll(ref)
            assert ref in living, f"the attempt ended: {self.started[ref].log.read_text(errors='replace')}"
            return living[ref] not in (None, since)

        await _until(advanced, "the executor says something else of an attempt that has made progress")
        return (await self.poll(ref))[ref]

    async def advance(self, ref: str) -> None:
        """Wait until an attempt is seen to go on."""
        await self.progress(ref, since=await self.progress(ref))

    async def close(self) -> None:
        for ref in self.started:
            await self.executor.end(ref)
        await self.executor.close()


async def _check(site: Site, outlive: bool) -> None:
    try:
        first, second = site.prepared("first"), site.prepared("second")
        ref, other = await site.start(first), await site.start(second)
        assert len({ref, other, ""}) == 3, f"two attempts have the refs {ref!r} and {other!r}"
        await check_living(site, ref, other)
        await check_started_twice(site, ref, first)
        await check_signalled(site, other, second)
        assert ref in await site.poll(), "a signal to another attempt ended this one"
        ref = await check_restarted(site, ref, first, outlive)
        await check_never_begun(site)
        await check_ended(site, ref)
    finally:
        await site.close()


async def check_living(site: Site, *refs: str) -> None:
    """All that live are told at once, and no others."""
    asked = {**{ref: site.started[ref].path for ref in refs}, FOREIGN: site.started[refs[0]].path}
    living = await _soon(site.executor.poll(asked), "poll")
    assert set(living) == set(refs), f"of the attempts {refs}, which live, and of {FOREIGN!r} it says {dict(living)}"
    assert set(await site.poll(refs[0])) == {refs[0]}, "it tells of attempts that it was not asked about"
    assert await _soon(site.executor.poll({}), "poll") == {}, "of no attempts there is nothing to tell"
    await asyncio.gather(*(site.advance(ref) for ref in refs))


async def check_started_twice(site: Site, ref: str, attempt: AttemptDir) -> None:
    """The server may not know that a start has succeeded, and do it again."""
    again = await site.start(attempt)
    if again != ref:
        await site.gone(again, "is run by somebody else")
    assert await site.adopt(attempt) == ref, "who runs an attempt is another after it was started a second time"
    await site.advance(ref)
    steps = _steps(attempt)
    assert steps == list(range(1, len(steps) + 1)), f"an attempt that was started twice reported the steps {steps}"


async def check_signalled(site: Site, ref: str, attempt: AttemptDir) -> None:
    """SIGTERM ends an attempt, whose supervisor writes how it ended before it is gone."""
    await _soon(site.executor.signal(ref, signal.SIGTERM), "signal")
    await site.gone(ref, "was sent SIGTERM")
    assert read_exit(attempt) is not None, "the attempt does not live any more, and nobody has written how it ended"
    assert await site.adopt(attempt) == ref, "who ran an attempt is not known any more when it has ended"
    await _soon(site.executor.signal(ref, signal.SIGTERM), "signal")  # nobody is there: nothing happens


async def check_restarted(site: Site, ref: str, attempt: AttemptDir, outlive: bool) -> str:
    """The next server knows refs and directories only; returns the ref of an attempt that lives."""
    await _soon(site.executor.close(), "close")
    site.executor = site.factory(site.settings)
    if not outlive:
        await site.gone(ref, "ended with its server")
        return await site.start(site.prepared("third"))
    assert ref in await site.poll(), "the attempt ended with its server, or the next server does not find it"
    assert await site.adopt(attempt) == ref, f"of an attempt with the ref {ref!r} the next server finds another"
    await site.advance(ref)
    return ref


async def check_never_begun(site: Site) -> None:
    """An attempt that nobody has begun never begins once the server has looked for it."""
    attempt = site.prepared("given-up")
    assert await site.adopt(attempt) is None, "nobody has begun this attempt, and somebody is said to run it"
    await site.gone(await site.start(attempt), "was given up before it was started")
    assert not _steps(attempt), "an attempt began that was given up before it was started"
    assert await site.adopt(attempt) is None, "somebody is said to have run an attempt that never began"


async def check_ended(site: Site, ref: str) -> None:
    """When an attempt was ended, nothing of it lives."""
    await site.progress(ref)
    await _soon(site.executor.end(ref), "end")
    before = _steps(site.started[ref])
    assert ref not in await site.poll(), "an attempt lives that was ended"
    await asyncio.sleep(SILENCE_SECONDS)
    assert _steps(site.started[ref]) == before, "an attempt that was ended still trains"
    await _soon(site.executor.end(ref), "end")  # there is nothing left to end


def _steps(attempt: AttemptDir) -> list[int]:
    """The steps that an attempt has reported."""
    return [event.step for _, event in tail(attempt.events) if isinstance(event, MetricsEvent)]


async def _soon(call: Awaitable[T], name: str) -> T:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await call
    except TimeoutError as error:
        raise AssertionError(f"{name}() did not return within {PATIENCE_SECONDS:g} seconds") from error


async def _until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    while not await condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what}: not so after {PATIENCE_SECONDS:g} seconds"
        await asyncio.sleep(LOOK_SECONDS)
