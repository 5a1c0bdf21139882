"""An inference engine as a child process: the server's side, which is the same for all of them.

The process is given `<dir>/spec.json` and says in `<dir>/ready.json` where it listens (`arbor_core.inference.child` is
its side). It ends when its standard input reaches the end, which is what happens when the server dies in whatever way,
and on SIGTERM. `GET /health` says in `stalled_seconds` for how long it has had work and made no progress.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from arbor_core.process.environment import clean_env, threads_env
from arbor_core.process.lifecycle import kill_session, stat_fields, terminate
from arbor_core.process.places import lives_in, place_ref
from arbor_core.types import ArborError, EngineSpec, Weights

from .child import READY

log = logging.getLogger(__name__)
POLL_SECONDS = 0.02
HEALTH_SECONDS = 5.0
STOPPED_SECONDS = 5.0
"""A process that is stopped (SIGSTOP, a debugger) for that long while it starts is killed."""
STOPPED = "Tt"
"""States of `/proc/<pid>/stat`."""


class EngineInterruptedError(ArborError):
    """Somebody stopped or killed the process of an engine while it started."""


class Health(msgspec.Struct):
    """What is read of an engine's answer to `GET /health`. One that says nothing of itself is only known to answer."""

    stalled_seconds: float | None = None
    quiet_seconds: float = 0.0
    """The same, from an engine that knows the key's former name only."""


class EngineProcess:
    """A live engine (see `arbor_core.types.Engine`); `start` creates it."""

    def __init__(self, process: asyncio.subprocess.Process, spec: EngineSpec, url: str) -> None:
        self.process, self.spec, self.url = process, spec, url
        self.headers = {"Authorization": f"Bearer {spec.token}"} if spec.token else {}

    @classmethod
    async def start(
        cls, argv: Sequence[str], env: Mapping[str, str], spec: EngineSpec, seconds: float = 600.0
    ) -> EngineProcess:
        """Run `argv + [spec.json]` and return when it listens.

        Args:
            argv: The command, without the specification's path.
            env: Variables laid over those of the server that an engine may see.
            seconds: How long loading may take.

        Raises:
            ArborError: it ended or did not listen in time; the message carries the last line it wrote. Or its devices
                are on another machine.
            EngineInterruptedError: it was killed, or stopped for `STOPPED_SECONDS`.
        """
        if elsewhere := [device for device in spec.devices if device.node]:
            raise ArborError(
                f"the engine of '{spec.model}' starts on the server's machine, and {elsewhere[0].id} is on the node "
                f"'{elsewhere[0].node}': choose a backend that reaches it, or an allocator of this machine's devices"
            )
        spec.dir.mkdir(parents=True, exist_ok=True)
        (spec.dir / "spec.json").write_bytes(msgspec.json.encode(spec, enc_hook=str))
        ready = spec.dir / READY
        ready.unlink(missing_ok=True)
        with (spec.dir / "engine.log").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *argv,
                str(spec.dir / "spec.json"),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**clean_env(), **threads_env(spec.threads), **env},
                cwd=spec.dir,  # `organization/name` must not be found as a folder beside whoever started the server
                start_new_session=True,
            )
        with contextlib.suppress(OSError):  # a full disk must not keep an engine from serving
            (spec.dir / REF).write_text(place_ref(process.pid, spec.dir))
        try:
            async with asyncio.timeout(seconds):
                await listening(process, spec)
        except BaseException as error:
            await terminate(process, 0 if isinstance(error, EngineInterruptedError) else None)
            if isinstance(error, TimeoutError):
                raise ArborError(f"the engine of '{spec.model}' did not start in {seconds:.0f} s") from None
            raise
        return cls(process, spec, json.loads(ready.read_bytes())["url"])

    async def load_weights(self, weights: Weights) -> None:
        """Load a PEFT adapter under a name."""
        body = {"lora_name": weights.name, "lora_path": weights.path}
        await self._post("/v1/load_lora_adapter", with_sent(body, weights.sent))

    async def unload(self, name: str) -> None:
        """Forget an adapter; requests that run on it finish first."""
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def update(self, path: str, version: int, sent: Mapping[str, Any] | None = None) -> None:
        """Replace all weights while it runs."""
        await self._post("/v1/update_weights", with_sent({"path": path, "version": version}, sent))

    async def health(self) -> bool:
        """Whether the process lives and answers."""
        return await self.stalled_for(HEALTH_SECONDS) is not None

    async def stalled_for(self, patience: float) -> float | None:
        """Seconds without progress while it has work; None: no answer within `patience` seconds."""
        import aiohttp

        if self.process.returncode is not None:
            return None
        try:
            timeout = aiohttp.ClientTimeout(total=patience)
            async with aiohttp.ClientSession(timeout=timeout) as session, session.get(f"{self.url}/health") as answer:
                return stalled_seconds(await answer.read()) if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def wait(self) -> str:
        """Return when the process has ended, with the last thing it wrote."""
        code = await self.process.wait()
        return f"exit status {code}: {last_line(self.spec.dir)}"

    async def stop(self) -> None:
        """End the process and everything it started."""
        await terminate(self.process)

    async def kill(self) -> None:
        """End the process and everything it started, at once: one that hangs ignores SIGTERM."""
        await terminate(self.process, 0)

    async def _post(self, path: str, body: Mapping[str, Any]) -> None:
        import aiohttp

        try:
            async with (
                aiohttp.ClientSession(headers=self.headers) as session,
                session.post(self.url + path, json=body) as answer,
            ):
                status, said = answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            said = str(error) or type(error).__name__
            raise ArborError(f"the engine of '{self.spec.model}' did not answer {path}: {said}") from None
        if status != 200:
            raise ArborError(f"the engine of '{self.spec.model}' refused {path} ({status}): {said[:500]}")


def with_sent(body: Mapping[str, Any], sent: Mapping[str, Any] | None) -> dict[str, Any]:
    """A request to take weights; with `sent` only where a sender has sent them."""
    return {**body} if sent is None else {**body, "sent": sent}


async def listening(process: asyncio.subprocess.Process, spec: EngineSpec) -> None:
    """Return when a process that starts says that it listens.

    Raises:
        ArborError: it ended; EngineInterruptedError: it was killed, or is stopped.
    """
    stopped = 0
    while not (spec.dir / READY).exists():
        if process.returncode is not None and process.returncode < 0:
            how = signal.strsignal(-process.returncode)
            raise EngineInterruptedError(f"the engine of '{spec.model}' was killed while it started ({how})")
        if process.returncode is not None:
            raise ArborError(f"the engine of '{spec.model}' did not start: {last_line(spec.dir)}")
        stopped = stopped + 1 if state(process.pid) in STOPPED else 0  # counted: this server may be stopped too
        if stopped * POLL_SECONDS >= STOPPED_SECONDS:
            raise EngineInterruptedError(f"the engine of '{spec.model}' was stopped while it started and is killed")
        await asyncio.sleep(POLL_SECONDS)


def state(pid: int) -> str:
    """The state of a process, as in `/proc/<pid>/stat`; `X`: it has ended."""
    try:
        return stat_fields(Path(f"/proc/{pid}/stat"))[0]
    except OSError:
        return "X"


def stalled_seconds(raw: bytes) -> float:
    """Seconds without progress while it has work, from an engine's answer to /health; 0 if it says nothing of that."""
    try:
        said = msgspec.json.decode(raw, type=Health)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 0.0
    return said.quiet_seconds if said.stalled_seconds is None else said.stalled_seconds


def last_line(folder: Path) -> str:
    """The last thing the engine wrote: usually the error."""
    lines = (folder / "engine.log").read_text(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it wrote nothing"


REF = "process"
"""File in an engine's directory that says which process it is."""


def end_engines(root: Path) -> None:
    """Kill engines of an earlier server that did not hear of its end: one that was stopped while it started, say."""
    for path in root.glob(f"*/{REF}"):
        ref = path.read_text(errors="replace")
        if lives_in(ref, path.parent):  # else it ended, or is another server's, of whose directory this is a copy
            try:
                kill_session(ref)
            except TimeoutError as error:
                log.warning("an engine of an earlier server is left: %s", error)
