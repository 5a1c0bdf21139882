"""The storage directory: held by one server, private, on a disk of this machine."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from arbor_core.types import ArborError

NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs")


def locked(root: Path) -> IO[str]:
    """Hold the storage directory, so that no second server works on it.

    Raises:
        ArborError: another server has it, or it cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if kind := network_kind(root, Path("/proc/self/mounts")):
            raise ArborError(
                f"the storage directory {root} is on a network file system ({kind}), on which locks and the database "
                "are not safe: set storage=DIR to a directory on a disk of this machine"
            )
        lock = (root / "lock").open("a+")
    except OSError as error:
        raise ArborError(f"cannot write to the storage directory {root}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ArborError(f"the storage directory {root} is in use by another server (pid {holder})") from None
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def make_private(root: Path) -> None:
    """Close what the server keeps to everybody else. The storage directory itself may hold more, and stays as it is.

    Raises:
        ArborError: it belongs to somebody else.
    """
    try:
        for name in ("files", "jobs", "engines", "run"):
            (root / name).mkdir(exist_ok=True)
            (root / name).chmod(0o700)
        (root / "arbor.db").touch(0o600)
        for path in (root / "lock", *root.glob("arbor.db*")):
            path.chmod(0o600)
    except OSError as error:
        raise ArborError(f"cannot make {error.filename} private: {error.strerror}") from None


def network_kind(folder: Path, mounts: Path) -> str | None:
    """The type of the file system that holds a folder if it is another machine's, as the list of mounts says."""
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:  # not Linux: it is not known
        return None
    mounted = {Path(fields[1].replace("\\040", " ")): fields[2] for line in lines if len(fields := line.split()) > 2}
    around = (folder.resolve(), *folder.resolve().parents)
    kind = next((mounted[place] for place in around if place in mounted), "")
    return kind if kind in NETWORK else None
