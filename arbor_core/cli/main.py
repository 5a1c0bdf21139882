"""The command `arbor`: look at and prepare an installation."""

from __future__ import annotations

import argparse
import importlib
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
    commands.add_parser("key", help="make an API key, and its hash for auth.keys")
    again = commands.add_parser("replay", help="run a job's trainer again and compare every step")
    again.add_argument("job", metavar="JOB", help="its id, or its directory")
    again.add_argument("--storage", type=Path, help="the server's storage directory (default: ~/.arbor/storage)")
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

            replay(find_job(arguments.job, arguments.storage or arbor_home() / "storage"), print)
        elif arguments.command == "tiny-model":
            tiny_model(arguments.dir)
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


def tiny_model(folder: Path) -> None:
    """Write the 1M-parameter base model that demos and tests use.

    Raises:
        ArborError: arbor-sft, whose model it is, is not installed.
    """
    try:
        tiny = importlib.import_module("arbor_sft.tiny")
    except ModuleNotFoundError:
        raise ArborError("the tiny model is made by arbor-sft, which is not installed: pip install arbor-sft") from None
    tiny.make(folder)
