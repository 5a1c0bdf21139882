"""What clients may read of an engine's failures: its own words without this machine's folders."""

from __future__ import annotations

import re
from pathlib import Path

from arbor_core.types import NO_RETRY, ApiError, UnknownModelError

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


def refusal(name: str, path: str, root: Path, error: Exception) -> ApiError:
    """The answer to requests for a model whose engine failed to start. The log has the reason with all paths.

    Args:
        name: Of the model, as the client knows it.
        path: Where its weights are.
        root: Directory of the engines' scratch directories.
    """
    reason = without_paths(str(error), path, str(root))
    if isinstance(error, UnknownModelError):
        return ApiError(404, f"The model '{name}' does not exist: {reason}", "model_not_found", "model")
    return ApiError(503, f"The model '{name}' cannot be served: {reason}", "engine_unavailable", None, NO_RETRY)
