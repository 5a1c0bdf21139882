"""Which of the engines that serve one model answers a request: the one with the fewest requests, but a conversation
stays where its earlier turns are in the cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from .served_model import ServedModel

REMEMBERED = 4096
"""Conversations whose engine is known; the one that was not heard of for longest is forgotten."""
CLEARLY_MORE = 4
"""Requests that an engine must have more than another before it loses a conversation to that."""


class Conversations:
    """Where conversations are."""

    def __init__(self) -> None:
        self.replicas: OrderedDict[tuple[str, str, bytes], int] = OrderedDict()

    def choose(
        self, model: tuple[str, str], conversation: bytes | None, replicas: Sequence[ServedModel]
    ) -> ServedModel:
        """The engine for a request, and for what follows in its conversation.

        Args:
            model: Name and path.
            conversation: What its requests have in common; None: it is none.
            replicas: The engines of the model, one at least.
        """
        ready = started(replicas)
        least = min(ready, key=lambda one: one.users)
        if conversation is None:
            return least
        key = (*model, conversation)
        before = next((one for one in ready if one.key.replica == self.replicas.get(key)), None)
        chosen = before if before and before.users - least.users <= CLEARLY_MORE else least
        self.replicas[key] = chosen.key.replica
        self.replicas.move_to_end(key)
        if len(self.replicas) > REMEMBERED:
            self.replicas.popitem(last=False)
        return chosen


def started(replicas: Sequence[ServedModel]) -> list[ServedModel]:
    """The engines that answer; while none does, the first that will."""
    return [one for one in replicas if one.engine] or list(replicas[:1])


def next_number(replicas: Sequence[ServedModel]) -> int:
    """The lowest number that no engine of a model has."""
    taken = {one.key.replica for one in replicas}
    return next(number for number in range(len(taken) + 1) if number not in taken)
