"""The command `arbor`: look at and prepare an installation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from arbor_core.types import ArborError


def main() -> None:
    """`arbor`."""
    parser = argparse.ArgumentParser(prog="arbor", description="Look at and prepare an Arbor installation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("plugins", help="list the installed plugins, what they bring, and what is broken")
    tiny = commands.add_parser("tiny-model", help="write a 1M-parameter base model for trying things out")
    tiny.add_argument("dir", type=Path, metavar="DIR")
    tiny.add_argument("--name", default="tiny", help="which of those that plugins bring (default: tiny)")
    commands.add_parser("key", help="make an API key, and its hash for auth.keys")
    again = commands.add_parser("replay", help="run a job's trainer again and compare every step")
    again.add_argument("job", metavar="JOB", help="its id, or its directory")
    again.add_argument("--storage", type=Path, help="the server's storage directory (default: ~/.arbor/storage)")
    again.add_argument(
        "--models", type=Path, action="append", default=[], help="a folder with the base model, if that has moved"
    )
    commands.add_parser("doctor", help="try every trainer's warm start and say which one must start cold")
    arguments = parser.parse_args()
    try:
        if arguments.command == "plugins":
            list_plugins()
        elif arguments.command == "key":
            from arbor_core.config import api_keys

            key = api_keys.new()
            print(f"key {key}\nsha256 {api_keys.digest(key)}")
        elif arguments.command == "replay":
            from arbor_core.config.user_file import arbor_home
            from arbor_core.worker.replay import find_job, replay

            job = find_job(arguments.job, arguments.storage or arbor_home() / "storage")
            replay(job, print, arguments.models)
        elif arguments.command == "tiny-model":
            tiny_model(arguments.dir, arguments.name)
            print(f"wrote {arguments.dir}")
        else:
            from .doctor import examine

            sys.exit(examine())
    except ArborError as error:
        sys.exit(f"arbor: {error}")


def list_plugins() -> None:
    """One line a plugin."""
    from arbor_core import plugins

    loaded = plugins.load()
    for plugin in plugins.installed():
        brings = [
            f"{plugins.singular(kind)} {name}"
            for kind in plugins.KINDS
            for name in loaded.all(kind)
            if loaded.owner(kind, name) == plugin.label
        ]
        print(f"{plugin.label:28} {loaded.broken.get(plugin.distribution) or ', '.join(brings) or 'hooks only'}")


def tiny_model(folder: Path, name: str = "tiny") -> None:
    """Write a small base model, as demos and tests use it.

    Args:
        folder: Its directory.
        name: Which of those that plugins bring (`arbor_tiny_models`).

    Raises:
        ArborError: no plugin brings it; the message names the package.
    """
    from arbor_core import plugins
    from arbor_core.jobdir.documents import import_object

    import_object(plugins.load().get("tiny_models", name))(folder)
