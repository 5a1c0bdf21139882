"""What a server does to a storage directory that it opens: brings it up to date, and sees that its jobs can go on."""

from __future__ import annotations

from arbor_core.crash_points import crash_point
from arbor_core.jobdir.documents import upgrade
from arbor_core.jobdir.layout import JobDir
from arbor_core.models.catalog import Models
from arbor_core.storage.database import Store
from arbor_core.types import PROTOCOL, ArborError


def keep_executor(store: Store, name: str) -> None:
    """Note under which executor jobs run. Another one cannot find their attempts: it would take them for lost, and
    start them a second time while they live.

    Raises:
        ArborError: jobs run under another executor.
    """
    noted = store.one("SELECT value FROM storage WHERE key='executor'")
    if noted is None or noted["value"] != name:
        running = [row["id"] for row in store.read("SELECT id FROM jobs WHERE status='running' ORDER BY seq")]
        if noted and running:
            raise ArborError(
                f"{len(running)} job(s) run with executor={noted['value']}, which executor={name} cannot find "
                f"({running[0]}, say): start the server with executor={noted['value']} and pause or cancel them first"
            )
        store.write_now("INSERT OR REPLACE INTO storage(key,value) VALUES('executor',?)", name)


def bring_up_to_date(store: Store, models: Models) -> str:
    """Bring the job directories of earlier versions up to date; returns the identity of the storage directory.

    Who died here does it again: each job says by itself whether it is done, and the database when all are.
    """
    kept: dict[str, str] = {row["key"]: row["value"] for row in store.read("SELECT key, value FROM storage")}
    if kept.get("protocol") != str(PROTOCOL):
        for row in store.read("SELECT id, json_extract(spec,'$.trainer') AS trainer FROM jobs"):
            upgrade(JobDir.of(models.root, row["id"]), kept["id"], row["trainer"], models.locate)
            crash_point("job.upgraded")
        store.write_now("INSERT OR REPLACE INTO storage(key,value) VALUES('protocol',?)", str(PROTOCOL))
    return kept["id"]
