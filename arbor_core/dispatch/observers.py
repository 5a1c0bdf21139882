"""The hook `arbor_job_event`: plugins that observe jobs, on a thread of their own.

A plugin that raises is logged; one that hangs fills the queue, and what does not fit is dropped and counted. Neither
reaches the jobs.
"""

from __future__ import annotations

import logging
import queue
import threading

from arbor_core.plugins import Plugins
from arbor_core.types import Event, JobView

log = logging.getLogger(__name__)
CAPACITY = 10_000
CLOSE_SECONDS = 5.0
"""How long the end of a server waits for plugins to hear of the last events."""


class Observers:
    """Hands events to the plugins that asked for them."""

    def __init__(self, plugins: Plugins) -> None:
        self.hook = plugins.manager.hook.arbor_job_event
        self.queue: queue.Queue[tuple[JobView, Event] | None] = queue.Queue(CAPACITY)
        self.dropped = 0
        self.wanted = bool(self.hook.get_hookimpls())
        self.thread = threading.Thread(target=self._run, name="observers", daemon=True)
        if self.wanted:
            self.thread.start()

    def notify(self, job: JobView, event: Event) -> None:
        """Pass an event on; never waits."""
        if not self.wanted:
            return
        try:
            self.queue.put_nowait((job, event))
        except queue.Full:
            self.dropped += 1
            if self.dropped % CAPACITY == 1:
                log.warning("arbor_job_event: a plugin is too slow, %d event(s) dropped", self.dropped)

    def close(self) -> None:
        """End the thread, once it has worked off its queue; a plugin that hangs is left behind."""
        if not self.wanted:
            return
        try:
            self.queue.put_nowait(None)
        except queue.Full:
            log.warning("arbor_job_event: a plugin hangs; its events are lost")
            return
        self.thread.join(CLOSE_SECONDS)
        if self.thread.is_alive():
            log.warning("arbor_job_event: a plugin has not ended after %g s; its events are lost", CLOSE_SECONDS)

    def _run(self) -> None:
        while entry := self.queue.get():
            job, event = entry
            for impl in self.hook.get_hookimpls():  # one by one: an exception stops only its own plugin
                try:
                    impl.function(**{name: {"job": job, "event": event}[name] for name in impl.argnames})
                except Exception:
                    log.exception("arbor_job_event of %s", impl.plugin_name)
