"""Devices: what a job claims, and what it is leased."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, Protocol

from msgspec import Struct

from .errors import ArborError


class Device(Struct, frozen=True):
    """A device that can be leased. `id` is unique in a server's inventory, whatever the node: a GPU's UUID, or `cpu:0`
    for a CPU slot."""

    id: str
    kind: Literal["cpu", "cuda", "mock"] = "cpu"
    index: int = 0
    memory: int = 0
    """Bytes; 0 where it is not known."""
    node: str = ""
    """Name of the machine that it is on; empty: the server's own."""


class Bundle(Struct, frozen=True):
    """Some devices of one kind and one node for one purpose."""

    role: str
    """`train`, or `engine:<base model>`."""
    count: int = 1
    share: float = 1.0
    """Fraction of each device's memory, in (0, 1]."""
    kind: str | None = None


class Claim(Struct, frozen=True):
    """The devices that an owner needs: it gets all bundles or none, so that nobody holds half of what it needs."""

    owner: str
    """A job's id, or an engine's key."""
    bundles: tuple[Bundle, ...]


class Lease(Struct, frozen=True):
    """The devices that the owner of a claim holds: those of each bundle, in the claim's order."""

    id: str
    claim: Claim
    devices: tuple[tuple[Device, ...], ...]

    def of(self, role: str) -> tuple[Device, ...]:
        """The devices leased for one role."""
        pairs = zip(self.claim.bundles, self.devices, strict=True)
        return tuple(device for bundle, devices in pairs if bundle.role == role for device in devices)

    def nodes(self) -> tuple[str, ...]:
        """The node of each bundle."""
        return tuple(devices[0].node for devices in self.devices)


class Allocator(Protocol):
    """Grants leases. `inventory` may change while the server runs (a GPU that falls off the bus)."""

    def inventory(self) -> Mapping[str, Sequence[Device]]:
        """Devices by pool: `train` and `engine`, without those that are lost."""
        ...

    def lost(self) -> Mapping[str, Sequence[Device]]:
        """Devices that were set aside, by the pool that they belong to."""
        ...

    def set_aside(self, devices: Collection[str]) -> None:
        """Grant the devices with these ids to nobody any more: they are lost. Leases that hold them stay until they are
        released."""
        ...

    def free(self) -> Mapping[str, int]:
        """How many devices of each pool are not leased, not even a share of one."""
        ...

    def free_by_node(self) -> Mapping[str, Mapping[str, int]]:
        """The same by pool and node. One whose pools are on one node each may lack this method."""
        ...

    def restore(self, lease: Lease) -> None:
        """Take a lease that was granted before the server restarted."""
        ...

    async def acquire(self, claim: Claim) -> Lease:
        """Wait until the whole claim fits and hold it. Cancelling the call leaves nothing held.

        Raises:
            ArborError: the claim can never fit this inventory; DevicesLostError: it could, if nothing had been lost.
        """
        ...

    def release(self, lease: Lease) -> None:
        """Give the devices back; releasing twice is harmless."""
        ...


def pool_for(role: str) -> str:
    """The pool of the devices for a role: `engine` for `engine:Qwen/Qwen3-0.6B`."""
    return role.partition(":")[0]


def most_on_one_node(devices: Collection[Device]) -> int:
    """How many of the devices a single bundle can have."""
    return max(Counter(device.node for device in devices).values(), default=0)


def devices_by_pool(claim: Claim) -> dict[str, int]:
    """How many devices of each pool a claim needs."""
    counts: dict[str, int] = {}
    for bundle in claim.bundles:
        pool = pool_for(bundle.role)
        counts[pool] = counts.get(pool, 0) + bundle.count
    return counts


def free_by_node(allocator: Allocator) -> dict[str, dict[str, int]]:
    """Free devices by pool and node.

    Raises:
        ArborError: the allocator has a pool on several nodes, and does not say what is free on which.
    """
    if hasattr(allocator, "free_by_node"):
        return {pool: dict(nodes) for pool, nodes in allocator.free_by_node().items()}
    found: dict[str, dict[str, int]] = {}
    for pool, count in allocator.free().items():
        nodes = {device.node for device in allocator.inventory().get(pool, ())} or {""}
        if len(nodes) > 1:
            names = ", ".join(repr(node) for node in sorted(nodes))
            text = f"{type(allocator).__name__} has devices of '{pool}' on {names}, and does not say how many are free"
            raise ArborError(f"{text} on each: an allocator of several nodes needs the method free_by_node()")
        found[pool] = {nodes.pop(): count}
    return found


def placements(claim: Claim, free: Mapping[tuple[str, str], int]) -> Iterator[Counter[tuple[str, str]]]:
    """The ways to place a claim on free devices, each bundle on one node. Allocators take the first: of the nodes that
    have enough the one with the fewest. Bundles are taken to need whole devices.

    Args:
        free: Free devices by pool and node.

    Yields:
        How many devices the claim needs, by pool and node.
    """
    yield from _placements(claim.bundles, free, Counter())


def _placements(
    bundles: Sequence[Bundle], free: Mapping[tuple[str, str], int], needed: Counter[tuple[str, str]]
) -> Iterator[Counter[tuple[str, str]]]:
    """The ways to place these bundles beside what is needed already."""
    if not bundles:
        yield Counter(needed)
        return
    pool, count = pool_for(bundles[0].role), bundles[0].count
    left = {place: number - needed[place] for place, number in free.items() if place[0] == pool}
    for place in sorted(left, key=left.__getitem__):
        if left[place] >= count:
            yield from _placements(bundles[1:], free, needed + Counter({place: count}))
