"""`arbor-serve`: from the command line (Hydra: `key=value`, `+trainer=sft`, `--cfg job`) to a running server."""

from __future__ import annotations

import difflib
import os
import re
import signal
import socket
import sys
from typing import Any, NoReturn

from omegaconf import DictConfig

from arbor_core.config.settings import ServeConfig
from arbor_core.types import ArborError, RolloutConfig

EXIT_CONFIG = 78
"""sysexits.h: a configuration error."""


def serve() -> None:
    """`arbor-serve`."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing a traceback; we print one line
    import hydra
    from hydra.errors import CompactHydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from arbor_core.config.compose import core_config_dir, take_over_hydra
    from arbor_core.config.user_file import overrides, with_new_key

    try:
        sys.argv[1:] = [open_ended(with_new_key(word)) for word in sys.argv[1:]]
        ours = first_override(sys.argv[1:]) + 1
        sys.argv[ours:ours] = overrides(os.environ)
        take_over_hydra()
        hydra.main(version_base="1.3", config_path=str(core_config_dir()), config_name="serve")(run_server)()
    except OverrideParseException as error:
        if "auth." in error.override:  # no key on a terminal or in a log
            give_up("cannot read 'auth.keys=...': check its brackets and quotes")
        give_up(f"cannot read '{error.override}': {error.message.partition(' See ')[0].splitlines()[0]}")
    except (CompactHydraException, OmegaConfBaseException) as error:
        give_up(plain_words(str(error) or str(error.__cause__)))
    except ArborError as error:
        give_up(str(error))


def first_override(arguments: list[str]) -> int:
    """Where `KEY=VALUE` begins: argparse wants all of them in one place."""
    found = (n for n, word in enumerate(arguments) if "=" in word and not word.startswith("-"))
    return next(found, len(arguments))


def open_ended(word: str) -> str:
    """`engine.` and `trainers.` take keys of plugins, which conf/serve.yaml does not know, `launcher.env.` any
    variable, and `trainer.` former names of keys, which the trainer's YAML does not have: Hydra is to add them."""
    former = tuple(f"trainer.{key}=" for key in RolloutConfig.former_keys)
    return f"++{word}" if word.startswith(("engine.", "trainers.", "launcher.env.", *former)) else word


def plain_words(message: str) -> str:
    """Hydra's complaint in one line, with the nearest key or group instead of advice that would not work."""
    from arbor_core.config import convert, settings
    from arbor_core.plugins import RESERVED

    line = " ".join(message.split()).partition(" Config search path:")[0]
    if key := re.match(r"Could not override '([^']+)'", line):
        if key[1] == "trainer":
            return "a method is chosen with a plus sign: +trainer=NAME"
        name = key[1].removeprefix("trainer.")
        known = list(convert.key_paths(settings.ServeConfig))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see them all with: arbor-serve --cfg job"
        return f"no key '{key[1]}'; {hint}"
    if group := re.search(r"Could not find '(\w+)/([^']+)'.*Available options in '\w+': (.*)", line):
        if reserved := RESERVED.get((f"{group[1]}s", group[2])):
            return reserved
        close = difflib.get_close_matches(group[2], group[3].split(), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"installed: {', '.join(group[3].split())}"
        return f"no {group[1]} called '{group[2]}'; {hint}"
    return line


def give_up(message: str) -> NoReturn:
    """One line on standard error, and an exit status that is not 0."""
    line = " ".join(message.split())
    print(f"arbor-serve: {line}", file=sys.stderr)
    sys.exit(EXIT_CONFIG if "not found (have" in line else 1)


def run_server(cfg: DictConfig) -> None:
    """Everything after Hydra has composed the configuration."""
    try:
        start(cfg)
    except ArborError as error:  # here, because Hydra would add a line of its own
        give_up(str(error))


def start(cfg: DictConfig) -> None:
    """Check the configuration, take the address, serve.

    Raises:
        ArborError: something in it cannot be had.
    """
    from hydra.core.hydra_config import HydraConfig

    from arbor_core import plugins
    from arbor_core.application.system import check_paths
    from arbor_core.config.compose import settings_of

    settings = settings_of(cfg)
    loaded = plugins.load(settings.plugins.disabled)
    chosen = HydraConfig.get().runtime.choices.get("trainer")
    if chosen is None and os.environ.get("ARBOR_MOCK_GPU", "") not in ("", "0"):
        chosen = loaded.simulated_trainer()
    if chosen is not None:
        loaded.get("trainers", chosen)
    check_exposure(settings)
    check_paths(settings)
    listener = bound(settings.host, settings.port)  # before anything touches the jobs
    with listener:
        run(settings, loaded, chosen, listener)


def run(settings: ServeConfig, loaded: Any, chosen: str | None, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT."""
    from arbor_core.application.system import open_system

    os.umask(0o077)  # what it writes, and what its processes write, is for its own user
    system = open_system(settings, loaded, chosen)

    from arbor_core.server.app import create_app
    from arbor_core.server.http.serving import Server

    server = Server(create_app(system, lambda _: server.give_up()), listener, settings.limits)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has shut down: that is success
        signal.signal(number, lambda *_: None)
    server.run(sockets=[listener])
    if not server.started or system.failure:
        sys.exit(1)


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address.

    Raises:
        ArborError: the address is taken, or not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # The protocol by name, or asyncio leaves Nagle's algorithm on: 40 ms more for every answer in two parts.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        taken = "is already in use" if error.errno == 98 else f"cannot be used: {error.strerror or error}"  # EADDRINUSE
        raise ArborError(f"address {host}:{port} {taken}") from None
    return listener


def check_exposure(settings: ServeConfig) -> None:
    """Refuse to listen to other machines without a key.

    Raises:
        ArborError: with what to set.
    """
    loopback = settings.host in ("localhost", "::1") or settings.host.startswith("127.")
    if not loopback and not settings.auth.keys and not settings.auth.insecure:
        raise ArborError(
            f"host={settings.host} lets other machines in, but auth.keys is empty: set auth.keys=[SECRET], "
            "or auth.insecure=true if you mean it"
        )
