"""The devices of a server, and the history of their leases as pages, newest first."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from arbor_core.jobs.leases import LeaseEnd, LeaseRow, lease_rows, lease_seq
from arbor_core.storage.database import Store
from arbor_core.types import Allocator

from .objects import position


class DeviceLease(Struct):
    """A device in a lease: who has or had it. Times are in seconds since the epoch."""

    id: str
    device: str
    owner: str
    """A job's id, or `engine:` and the name of the model that it serves."""
    role: str
    share: float
    """Part of the device's memory."""
    began_at: float
    ended_at: float | None
    reason: LeaseEnd | None
    """Why it ended; null: it goes on."""
    object: Literal["arbor.lease"] = "arbor.lease"


class DeviceLeaseList(Struct):
    data: list[DeviceLease]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class DeviceObject(Struct):
    """A device that the server leases, or that was lost."""

    id: str
    kind: str
    index: int
    memory: int
    """Bytes; 0: not known."""
    node: str | None
    """The machine that it is on; null: the server's own."""
    pools: list[str]
    """`train`, `engine` or both."""
    lost: bool
    """A job lost it, and nobody gets it before the server starts again."""
    leases: list[DeviceLease]
    """Those of now."""
    object: Literal["arbor.device"] = "arbor.device"


class DeviceList(Struct):
    data: list[DeviceObject]
    object: Literal["list"] = "list"


def list_devices(allocator: Allocator, store: Store) -> DeviceList:
    """Every device, with who has it now."""
    found: dict[str, DeviceObject] = {}
    for devices_of, lost in ((allocator.inventory(), False), (allocator.lost(), True)):
        for pool, devices in devices_of.items():
            for device in devices:
                node = device.node or None
                new = DeviceObject(device.id, device.kind, device.index, device.memory, node, [], lost, [])
                found.setdefault(device.id, new).pools.append(pool)
    for row in lease_rows(store, -1, held=True):
        if row.device in found:
            found[row.device].leases.append(lease_object(row))
    return DeviceList(list(found.values()))


def list_leases(store: Store, limit: int, after: str | None = None, device: str | None = None) -> DeviceLeaseList:
    """A page of the history, newest first.

    Args:
        after: The id of the last lease of the page before.
        device: Only leases of this device, which need not be there any more.

    Raises:
        ApiError: `after` is no lease that is remembered.
    """
    rows = lease_rows(store, limit + 1, position(after, lambda lease: lease_seq(store, lease)), device)
    data = [lease_object(row) for row in rows[:limit]]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return DeviceLeaseList(data, first, last, has_more=len(rows) > limit)


def lease_object(row: LeaseRow) -> DeviceLease:
    return DeviceLease(row.id, row.device, row.owner, row.role, row.share, row.began_at, row.ended_at, row.reason)
