"""`arbor-serve`: from the command line (Hydra: `key=value`, `+trainer=sft`, `--cfg job`) to a running server."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any, NoReturn

from omegaconf import DictConfig

from arbor_core.config.settings import ServeConfig
from arbor_core.types import ArborError

EXIT_CONFIG = 78
"""sysexits.h: a configuration error."""


def serve() -> None:
    """`arbor-serve`."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing a traceback; we print one line
    import hydra

    from arbor_core.config.command_line import COMPLAINTS, as_overrides, complaint
    from arbor_core.config.compose import core_config_dir, take_over_hydra
    from arbor_core.config.user_file import overrides

    try:
        sys.argv[1:] = as_overrides(sys.argv[1:])
        ours = first_override(sys.argv[1:]) + 1
        sys.argv[ours:ours] = overrides(os.environ)
        take_over_hydra()
        hydra.main(version_base="1.3", config_path=str(core_config_dir()), config_name="serve")(run_server)()
    except COMPLAINTS as error:
        give_up(complaint(error))
    except ArborError as error:
        give_up(str(error))


def first_override(arguments: list[str]) -> int:
    """Where `KEY=VALUE` begins: argparse wants all of them in one place."""
    found = (n for n, word in enumerate(arguments) if "=" in word and not word.startswith("-"))
    return next(found, len(arguments))


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
    from arbor_core.application.choice import check_paths
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
