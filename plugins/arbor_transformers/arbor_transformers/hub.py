"""`python -m arbor_transformers.hub ORGANIZATION/NAME`: whether the hub, or its cache on this machine, has a model.

Exit status 4 and one line if not. A process of its own, so that the server imports nothing of it, and without torch:
loading would try each of a model's files five times before it gave up.
"""

import sys

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError

NOT_THERE = 4
HUB_SECONDS = 5.0
"""How long the hub may take to answer."""


def missing(model: str) -> str | None:
    """Why a model cannot be had; None if it can."""
    if isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None
    here = "it is not on this server"
    if constants.HF_HUB_OFFLINE:
        return f"{here}, and HF_HUB_OFFLINE forbids to ask the hub for it"
    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        return f"{here}, and the hub has no such model, or shows it to others only (HF_TOKEN)"
    except Exception as error:  # of the hub's library, of its HTTP client, or of the system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{here}, and the hub could not be asked for it ({reason})"
    return None


def main() -> int:
    reason = missing(sys.argv[1])
    if reason is None:
        return 0
    print(reason)
    return NOT_THERE


if __name__ == "__main__":
    sys.exit(main())
