"""The error that reaches a client of the API with a status and a code of its own."""

from __future__ import annotations

import re
from pathlib import Path

_PATH = re.compile(r"""(?<![\w.:/\\])/(?:[^\s/'"`:;,()\[\]<>]+/)+([^\s/'"`:;,()\[\]<>]*)""")
"""An absolute path of two parts or more; not a URL, which has something before its first slash."""


def without_paths(text: str, *known: str) -> str:
    """A message of an engine as a client may read it: of every path on this machine, only the last name is left.

    Args:
        known: Paths that may be in it and may hold spaces, which no pattern would find the end of.
    """
    for path in filter(None, known):
        if len(Path(path).parts) > 2:
            text = text.replace(path, Path(path).name).replace(str(Path(path).parent), "...")
    return _PATH.sub(r"\1", text)
