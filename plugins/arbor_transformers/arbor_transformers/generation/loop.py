"""The generation loop: one thread that owns the model and advances every running sequence by a token a turn.

Sequences wait in a queue, enter in groups of similar length, run side by side whatever their parameters and adapters,
and leave one by one. When the cache is full the youngest go back to the queue and are computed again later.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from arbor_core.engine import ApiError, Progress
from arbor_transformers.errors import failure, queue_full, stopping
from arbor_transformers.model.batch import Batch, Prefill
from arbor_transformers.model.lora import Adapter

from .sampler import Sampled, sample
from .sequence import Delta, Generation, Sink

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Entry:
    """Sequences whose prompts are running: `picks[i]` is the prompt of `members[i]`."""

    prefill: Prefill
    members: list[Generation]
    picks: list[int]


class GenerationLoop:
    """Runs generations on a batch in a thread of its own.

    Args:
        batch: The model's rows.
        max_batch: Rows at once.
        max_waiting: Sequences in the queue.
        prefill_tokens: Prompt tokens that enter together.
        deliver: Called from the engine's thread with each turn's deltas.
        broken: Called when the device is lost and the process must end.
        version: Policy version of the weights, if they are a policy.
    """

    def __init__(
        self,
        batch: Batch,
        max_batch: int,
        max_waiting: int,
        prefill_tokens: int,
        deliver: Callable[[list[tuple[Sink, Delta]]], None],
        broken: Callable[[], None],
        version: int | None = None,
    ) -> None:
        self.batch, self.max_batch = batch, max_batch
        self.max_waiting, self.prefill_tokens = max_waiting, prefill_tokens
        self.deliver, self.broken, self.version = deliver, broken, version
        self.progress = Progress()
        self.rows: list[Generation] = []
        self.entry: Entry | None = None
        self.queue: deque[Generation] = deque()
        self.calls: deque[Callable[[], None]] = deque()
        self.changed = threading.Condition()
        self.ending = False
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def running(self) -> int:
        entry = self.entry
        return len(self.rows) + (len(entry.members) if entry else 0)

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def start(self) -> None:
        self.thread.start()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue the sequences of one request.

        Raises:
            ApiError: the queue is full, or the engine ends.
        """
        with self.changed:
            if self.ending:
                raise stopping()
            if self.queue and len(self.queue) + len(generations) > self.max_waiting:
                raise queue_full(len(self.queue))
            self.queue.extend(generations)
            self.changed.notify()

    def cancel(self, generations: Sequence[Generation]) -> None:
        """Let sequences leave at the next turn; nothing more is reported of them."""
        with self.changed:
            for generation in generations:
                generation.cancelled = True
            self.changed.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function between two turns."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self.changed:
            self.calls.append(run)
            self.changed.notify()
        return future

    def replace_weights(self, replace: Callable[[], None], version: int) -> "Future[None]":
        """Replace the model's weights between two turns. The process ends if that fails: they may be mixed then."""

        def run() -> None:
            try:
                replace()
            except BaseException:
                self.broken()
                raise
            self.version = version

        return self.call(run)

    def stop(self) -> None:
        """End every sequence with an error, and the thread."""
        with self.changed:
            self.ending = True
            self.changed.notify()

    def _run(self) -> None:
        try:
            self._turns()
        except BaseException:
            # Whatever the cause, no request would ever be answered again.
            log.exception("the engine's thread ends")
            self.broken()
        with self.changed:
            self.ending = True
        self._fail([*self.rows, *(self.entry.members if self.entry else []), *self.queue], stopping())

    def _turns(self) -> None:
        with torch.inference_mode():
            while self._wait():
                while self.calls:
                    self.calls.popleft()()
                self._sweep()
                self._enter()
                self._step()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when the loop must end."""
        with self.changed:
            self.progress.idle()
            self.changed.wait_for(lambda: self.ending or self.queue or self.rows or self.entry or self.calls)
            self.progress.mark()
            return not self.ending

    def _sweep(self) -> None:
        """Let cancelled sequences go."""
        with self.changed:
            if any(generation.cancelled for generation in self.queue):
                self.queue = deque(generation for generation in self.queue if not generation.cancelled)
        if self.entry and all(member.cancelled for member in self.entry.members):
            self.entry = None
        try:
            self._drop({row for row, generation in enumerate(self.rows) if generation.cancelled})
        except Exception as error:
            self._fail_rows(error)

    def _enter(self) -> None:
        """Run the next chunk of the prompts that are entering, or choose some to enter."""
        try:
            if self.entry is None:
                self.entry = self._choose()
            if self.entry is None or not self.entry.prefill.advance():
                return
        except Exception as error:
            members, self.entry = self.entry.members if self.entry else [], None
            self._fail_after("running a prompt", members, error)
            return
        entry, self.entry = self.entry, None
        staying = [
            (member, pick) for member, pick in zip(entry.members, entry.picks, strict=True) if not member.cancelled
        ]
        if not staying:
            return
        first = len(self.rows)
        self.rows += [member for member, _ in staying]
        try:
            self._advance(first, self.batch.admit(entry.prefill, [pick for _, pick in staying]))
        except Exception as error:
            self._fail_rows(error)

    def _choose(self) -> Entry | None:
        """Take sequences of similar length from the queue, the oldest first, as many as fit."""
        with self.changed:
            nearest = [self.queue[i] for i in range(min(len(self.queue), self.max_batch))]
            alike = [one for one in nearest if self.batch.alike(nearest[0].length, one.length)]
            alike = alike[: self.batch.fits([one.length + 1 for one in alike])]
            members: list[Generation] = []
            prompts: dict[tuple[Adapter | None, tuple[int, ...]], int] = {}
            for one in alike:
                key = (one.adapter, one.ids)
                longest = max(one.length, *(len(ids) for _, ids in prompts)) if prompts else one.length
                if prompts and key not in prompts and (len(prompts) + 1) * longest > self.prefill_tokens:
                    break
                prompts.setdefault(key, len(prompts))
                members.append(one)
            if not members:
                return None
            picks = [prompts[one.adapter, one.ids] for one in members]
        for one in members:
            one.version = self.version if one.version is None else one.version
            taken = set(map(id, members))
            self.queue = deque(one for one in self.queue if id(one) not in taken)
        try:
            prefill = self.batch.prefill([ids for _, ids in prompts], [adapter for adapter, _ in prompts])
        except Exception as error:
            self._fail_after("preparing a prompt", members, error)
            return None
        return Entry(prefill, members, picks)

    def _step(self) -> None:
        """Advance all rows by one token."""
        try:
            self._make_room()
            if self.rows:
                self._advance(0, self.batch.step([row.tokens[-1] for row in self.rows]))
        except Exception as error:
            self._fail_rows(error)

    def _make_room(self) -> None:
        """Send the last rows back to the queue when the next tokens would not fit into the cache."""
        surplus = self.batch.overflow()
        if not surplus:
            return
        leaving = self.rows[-surplus:]
        self._drop(set(range(len(self.rows) - surplus, len(self.rows))))
        with self.changed:
            self.queue.extendleft(reversed(leaving))

    def _advance(self, first: int, logits_BV: torch.Tensor) -> None:
        """Choose the next token of the rows from `first` on, report, and let go of those that end."""
        rows = self.rows[first:]
        deltas: list[tuple[Sink, Delta]] = []
        ended: set[int] = set()
        for row, (generation, sampled) in enumerate(zip(rows, sample(logits_BV, rows), strict=True), first):
            delta = self._take(generation, sampled)
            if delta is not None:
                deltas.append((generation.sink, delta))
                if delta.finish or delta.error:
                    ended.add(row)
        self._drop(ended)
        if deltas:
            self.deliver(deltas)

    def _take(self, generation: Generation, sampled: Sampled) -> Delta | None:
        """Append a token to its sequence; a failure to make text of it fails this sequence alone, not the batch."""
        try:
            return generation.take(sampled)
        except Exception as error:
            log.exception("failed to take a token")
            return Delta(generation.choice, "", [], error=failure("making text", error))

    def _drop(self, rows: set[int]) -> None:
        if rows:
            self.rows = [self.rows[old] for old in self.batch.drop(rows)]

    def _fail(self, generations: Sequence[Generation], error: ApiError) -> None:
        self.deliver([(one.sink, Delta(one.choice, "", [], error=error)) for one in generations])

    def _fail_rows(self, error: Exception) -> None:
        rows, self.rows = self.rows, []
        self.batch.clear()
        self._fail_after("generating", rows, error)

    def _fail_after(self, doing: str, generations: Sequence[Generation], error: Exception) -> None:
        """Fail the sequences that were in the call that failed; end the process if the device is lost with it."""
        log.error("failed %s %d sequences", doing, len(generations), exc_info=error)
        self._fail(generations, failure(doing, error))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                log.exception("the GPU is lost to this process")
                self.broken()
