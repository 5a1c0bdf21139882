"""`/v1/arbor/devices` and `/v1/arbor/leases`: who has each device, and who had it. They name the jobs of all tenants,
and so they need an admin's key."""

from __future__ import annotations

from litestar import get

from arbor_core.application import devices
from arbor_core.application.system import Arbor
from arbor_core.server import schemas
from arbor_core.server.http.openapi import described
from arbor_core.server.http.requests import AnyRequest, query


@get("/v1/arbor/devices", operation_id="listDevices", opt=described("List devices, and who has them now."))
async def list_devices(arbor: Arbor) -> devices.DeviceList:
    return devices.list_devices(arbor.allocator, arbor.store)


@get(
    "/v1/arbor/leases",
    operation_id="listLeases",
    opt=described("List who has and had the devices, newest first, and why it ended.", query=schemas.LeasePage),
)
async def list_leases(request: AnyRequest, arbor: Arbor) -> devices.DeviceLeaseList:
    page = query(request, schemas.LeasePage)
    return devices.list_leases(arbor.store, page.limit, page.after, page.device)


ROUTES = [list_devices, list_leases]
