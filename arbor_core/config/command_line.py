"""What the words of a command line mean to Hydra, and what its complaints mean to their author."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from hydra.errors import CompactHydraException, HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from arbor_core.plugins import RESERVED
from arbor_core.types import RolloutConfig

from .convert import key_paths
from .settings import ServeConfig
from .user_file import PATTERNS, with_new_key

COMPLAINTS = (CompactHydraException, HydraException, OmegaConfBaseException)
"""What Hydra raises over somebody's words."""


def as_overrides(words: Iterable[str]) -> list[str]:
    """`KEY=VALUE`, as users write it, for Hydra."""
    return [open_ended(with_new_key(word)) for word in words]


def complaint(error: BaseException) -> str:
    """One of COMPLAINTS, in one line."""
    if not isinstance(error, OverrideParseException):
        return plain_words(str(error) or str(error.__cause__), keys_beside(error))
    if "auth." in error.override:  # no key on a terminal or in a log
        return "cannot read 'auth.keys=...': check its brackets and quotes"
    return f"cannot read '{error.override}': {error.message.partition(' See ')[0].splitlines()[0]}"


def open_ended(word: str) -> str:
    """A word of the command line whose key Hydra is to add: `engine.`, `engines.` and `trainers.` take keys of plugins,
    which conf/serve.yaml does not know, `launcher.env.` any variable, `inference.models=` patterns, and `trainer.`
    former names of keys, which the trainer's YAML does not have."""
    former = tuple(f"trainer.{key}=" for key in RolloutConfig.former_keys)
    patterns = tuple(f"{name}=" for name in PATTERNS)
    unknown = ("engine.", "engines.", "trainers.", "launcher.env.", *former, *patterns)
    return f"++{word}" if word.startswith(unknown) else word


def keys_beside(error: BaseException) -> list[str]:
    """The keys of the group inside which Hydra found no such key; none where the group itself is not there."""
    group = getattr(error.__cause__, "parent_node", None)
    if not isinstance(group, DictConfig) or group._get_parent() is None:
        return []
    return [str(key) for key in group]


def plain_words(message: str, beside: Sequence[str] = ()) -> str:
    """Hydra's complaint in one line, with the nearest key or group instead of advice that would not work.

    Args:
        beside: The keys of the group that has no key of that name.
    """
    line = " ".join(message.split()).partition(" Config search path:")[0]
    if key := re.match(r"Could not override '([^']+)'", line):
        if key[1] == "trainer":
            return "a method is chosen with a plus sign: +trainer=NAME"
        group, _, name = key[1].rpartition(".")
        if f"{group}.".startswith("trainer."):  # which keys there are depends on the trainer
            close = [f"{group}.{near}" for near in difflib.get_close_matches(name, beside, n=1)]
            if not beside and group == "trainer":
                return f"no key '{key[1]}' without a method: choose it with +trainer=NAME"
        else:
            close = difflib.get_close_matches(key[1], list(key_paths(ServeConfig)), n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see them all with: arbor-serve --cfg job"
        return f"no key '{key[1]}'; {hint}"
    if group := re.search(r"Could not find '(\w+)/([^']+)'.*Available options in '\w+': (.*)", line):
        if reserved := RESERVED.get((f"{group[1]}s", group[2])):
            return reserved
        close = difflib.get_close_matches(group[2], group[3].split(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"installed: {', '.join(group[3].split())}"
        return f"no {group[1]} called '{group[2]}'; {hint}"
    return line
