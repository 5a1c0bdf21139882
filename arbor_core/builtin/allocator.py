"""The allocator `local`: the GPUs of this machine, or CPU slots where there are none.

Two pools: `train` and `engine`. One device may be in both (a single GPU that trains and serves); within a pool the
shares of it that are leased come to 1 at most. A device that a job lost is set aside until the server starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter

from arbor_core import ids
from arbor_core.types import (
    AllocatorSettings,
    ArborError,
    Bundle,
    Claim,
    Device,
    DevicesLostError,
    Lease,
    devices_by_pool,
    pool_for,
)

log = logging.getLogger(__name__)
Room = list[tuple[Device, float]]
"""Devices, and the share of each that is left."""
share_of = itemgetter(1)
ROUNDING = 1e-9
"""What shares may come to more than 1 because they are floating-point numbers: 0.1 ten times is not exactly 1."""


class PoolAllocator:
    """Leases devices, or shares of them, from fixed pools. A claim is granted as a whole or waits; the oldest that fits
    is first. The devices of a bundle are on one node."""

    def __init__(self, pools: Mapping[str, Sequence[Device]]) -> None:
        self.pools = {pool: tuple(devices) for pool, devices in pools.items()}
        self.lost_devices: dict[str, tuple[Device, ...]] = dict.fromkeys(self.pools, ())
        self.leases: dict[str, Lease] = {}
        self.held: dict[str, dict[str, dict[str, float]]] = {pool: {} for pool in self.pools}
        """Of each device in a pool that is leased, by its id: the shares of it that each lease holds."""
        self.waiting: list[tuple[Claim, asyncio.Future[Lease]]] = []

    def inventory(self) -> Mapping[str, Sequence[Device]]:
        return self.pools

    def lost(self) -> Mapping[str, Sequence[Device]]:
        return self.lost_devices

    def set_aside(self, devices: Collection[str]) -> None:
        for pool, members in self.pools.items():
            self.lost_devices[pool] += tuple(device for device in members if device.id in devices)
            self.pools[pool] = tuple(device for device in members if device.id not in devices)
        for claim, granted in self.waiting:
            if not granted.done() and (refusal := self._refusal(claim)):
                granted.set_exception(refusal)
        self._grant()

    def free(self) -> Mapping[str, int]:
        return {
            pool: sum(device.id not in self.held[pool] for device in devices) for pool, devices in self.pools.items()
        }

    def free_by_node(self) -> Mapping[str, Mapping[str, int]]:
        free: dict[str, dict[str, int]] = {}
        for pool, devices in self.pools.items():
            nodes = free[pool] = dict.fromkeys((device.node for device in devices), 0)
            for device in devices:
                nodes[device.node] += device.id not in self.held[pool]
        return free

    def _room(self) -> dict[str, Room]:
        """The devices of each pool, and the share of each that is not leased."""
        room = {}
        for pool, devices in self.pools.items():
            held = self.held[pool]
            room[pool] = [
                (device, 1 - math.fsum(held[device.id].values()) if device.id in held else 1.0) for device in devices
            ]
        return room

    def restore(self, lease: Lease) -> None:
        self._hold(lease)

    def _hold(self, lease: Lease) -> None:
        self.leases[lease.id] = lease
        for bundle, devices in zip(lease.claim.bundles, lease.devices, strict=True):
            held = self.held.setdefault(pool_for(bundle.role), {})
            for device in devices:
                held.setdefault(device.id, {})[lease.id] = bundle.share

    async def acquire(self, claim: Claim) -> Lease:
        check_claim(claim)
        granted: asyncio.Future[Lease] = asyncio.get_running_loop().create_future()
        self.waiting.append((claim, granted))
        self._grant()
        if not granted.done() and (refusal := self._refusal(claim)):
            self.waiting.remove((claim, granted))
            raise refusal
        try:
            return await granted
        except asyncio.CancelledError:
            self.waiting = [entry for entry in self.waiting if entry[1] is not granted]
            if granted.done() and not granted.cancelled() and not granted.exception():
                self.release(granted.result())
            raise

    def _refusal(self, claim: Claim) -> ArborError | None:
        """Why a claim can never be granted; None: it can, when nobody else holds anything."""
        if choose(claim.bundles, empty(self.pools)) is not None:
            return None
        needed = devices_by_pool(claim)
        wanted = " and ".join(f"{count} device(s) to {pool}" for pool, count in needed.items())
        text = f"{claim.owner} needs {wanted}, this server has {', '.join(map(self._described, needed))}"
        whole = {pool: (*devices, *self.lost_devices[pool]) for pool, devices in self.pools.items()}
        if choose(claim.bundles, empty(whole)) is None:
            return ArborError(text)
        lost = [device.id for pool in needed for device in self.lost_devices[pool]]
        return DevicesLostError(f"{text}: {', '.join(lost)} is lost")

    def _described(self, pool: str) -> str:
        """What a pool has, for people."""
        by_node = Counter(device.node for device in self.pools.get(pool, ()))
        if by_node.keys() <= {""}:
            return str(by_node.total())
        return " and ".join(f"{count} on {node or 'its own machine'}" for node, count in by_node.items())

    def release(self, lease: Lease) -> None:
        if self.leases.pop(lease.id, None):
            for bundle, devices in zip(lease.claim.bundles, lease.devices, strict=True):
                held = self.held[pool_for(bundle.role)]
                for device in devices:
                    held[device.id].pop(lease.id, None)
                    if not held[device.id]:
                        del held[device.id]
            self._grant()

    def _grant(self) -> None:
        """Grant the claims that fit now, oldest first."""
        still_waiting = []
        for claim, granted in self.waiting:
            if granted.done():
                continue
            lease = self._lease(claim)
            if lease is None:
                still_waiting.append((claim, granted))
                continue
            self._hold(lease)
            granted.set_result(lease)
        self.waiting = still_waiting

    def _lease(self, claim: Claim) -> Lease | None:
        """A lease of free devices for a claim; None: it does not fit now."""
        devices = choose(claim.bundles, self._room())
        return None if devices is None else Lease(ids.new("lease-"), claim, devices)


def check_claim(claim: Claim) -> None:
    """Raises ArborError where a bundle of a claim cannot be meant."""
    for bundle in claim.bundles:
        if bundle.count < 1 or not 0 < bundle.share <= 1:
            raise ArborError(
                f"{claim.owner} claims a share of {bundle.share:g} of {bundle.count} device(s): "
                "expected a share above 0 and up to 1, of one device or more"
            )


def empty(pools: Mapping[str, Sequence[Device]]) -> dict[str, Room]:
    """The devices of each pool as they are when nobody holds anything."""
    return {pool: [(device, 1.0) for device in devices] for pool, devices in pools.items()}


def choose(bundles: Sequence[Bundle], room: Mapping[str, Room]) -> tuple[tuple[Device, ...], ...] | None:
    """Devices for each bundle, those of one bundle on one node: the fullest node that has enough comes first, so that
    large bundles find room on the others, and on it the fullest devices. No two bundles share a device.

    Args:
        room: The devices of each pool, and the share of each that is left.

    Returns:
        None: they do not fit.
    """
    if not bundles:
        return ()
    bundle, pool = bundles[0], pool_for(bundles[0].role)
    nodes: dict[str, Room] = {}
    for device, share in room.get(pool, ()):
        if bundle.kind in (None, device.kind) and bundle.share <= share + ROUNDING:
            nodes.setdefault(device.node, []).append((device, share))
    for fitting in sorted(nodes.values(), key=lambda devices: (min(map(share_of, devices)), len(devices))):
        if len(fitting) >= bundle.count:
            chosen = tuple(device for device, _ in sorted(fitting, key=share_of)[: bundle.count])
            taken = {device.id for device in chosen}
            others = [one for one in room[pool] if one[0].id not in taken]
            further = choose(bundles[1:], {**room, pool: others})
            if further is not None:
                return (chosen, *further)
    return None


class LocalAllocator(PoolAllocator):
    """The devices of this machine."""

    @classmethod
    def from_settings(cls, settings: AllocatorSettings) -> LocalAllocator:
        """The pools that `gpu.train` and `gpu.inference` describe.

        Without these settings all GPUs but the last train, and the last serves; a single one does both.

        Raises:
            ArborError: a setting names a GPU that is not there.
        """
        gpus = find_gpus()
        if not gpus:
            train = settings.train if settings.train is not None else [0]
            serve = settings.inference if settings.inference is not None else range(settings.engines)
            return cls({"train": cpu_slots(train), "engine": cpu_slots(serve)})
        train = settings.train if settings.train is not None else [gpu.index for gpu in (gpus[:-1] or gpus)]
        serve = settings.inference if settings.inference is not None else [gpus[-1].index]
        return cls({"train": select_gpus(gpus, train, "train"), "engine": select_gpus(gpus, serve, "inference")})


def cpu_slots(indices: Sequence[int]) -> list[Device]:
    """Devices that stand for a CPU without GPUs; each can train one job, or serve one model, at a time."""
    return [Device(f"cpu:{index}", "cpu", index) for index in indices]


def select_gpus(gpus: Sequence[Device], wanted: Sequence[int], key: str) -> list[Device]:
    """The GPUs with the indices that the setting `gpu.<key>` names.

    Raises:
        ArborError: one is not there.
    """
    by_index = {gpu.index: gpu for gpu in gpus}
    for index in wanted:
        if index not in by_index:
            have = ", ".join(str(gpu.index) for gpu in gpus)
            raise ArborError(f"gpu.{key}: GPU {index} not found (have {have})")
    return [by_index[index] for index in wanted]


def find_gpus() -> list[Device]:
    """The GPUs that NVML finds, without those that are lost; none where there is no driver. Their ids are UUIDs."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    with closing_nvml(pynvml):
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
                uuid = pynvml.nvmlDeviceGetUUID(gpu)
                memory = pynvml.nvmlDeviceGetMemoryInfo(gpu).total
            except pynvml.NVMLError as error:
                log.warning("GPU %d cannot be used: %s", index, error)
                continue
            found.append(Device(uuid if isinstance(uuid, str) else uuid.decode(), "cuda", index, memory))
        return found


@contextlib.contextmanager
def closing_nvml(pynvml: object) -> Iterator[None]:
    """Shut NVML down at the end of a block."""
    try:
        yield
    finally:
        pynvml.nvmlShutdown()  # type: ignore[attr-defined]
