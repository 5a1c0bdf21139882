"""Which addresses a process listens on, as the kernel says it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from pathlib import Path

from arbor_core.process.lifecycle import stat_fields

LISTENS = "0A"
"""A socket's state in /proc/net/tcp."""


def listening(pid: int) -> set[str]:
    """The IP addresses on which a process has listening TCP sockets; none: it has ended."""
    try:
        inodes, tables = sockets_of(pid), [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    except (FileNotFoundError, ProcessLookupError):
        return set()
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    return {address_of(line[1].partition(":")[0]) for line in lines if line[3] == LISTENS and line[9] in inodes}


def sockets_of(pid: int) -> set[str]:
    """The inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            found.add(target[len("socket:[") : -1])
    return found


def address_of(words: str) -> str:
    """An address as /proc writes it: 32-bit words in the machine's own byte order."""
    raw = b"".join(struct.pack("=I", int(words[n : n + 8], 16)) for n in range(0, len(words), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def descendants(pid: int) -> set[int]:
    """A process and all that it has started, as far as their parents live."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat_fields(stat)[1])
        except OSError:  # it has ended
            continue
    found, size = {pid}, 0
    while len(found) > size:
        size = len(found)
        found |= {child for child, parent in parents.items() if parent in found}
    return found


def beyond_loopback(addresses: Iterable[str]) -> list[str]:
    """Those that other machines may reach."""
    return [one for one in addresses if not one.startswith("127.") and one != "::1"]
