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
    """The IP addresses on which a process has listening TCP sockets."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in inodes:
                found.add(address_of(fields[1].partition(":")[0]))
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
