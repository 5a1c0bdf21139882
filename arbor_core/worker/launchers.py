"""From an order for one process to one for several ranks, by the launcher that the operator chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from arbor_core.config.convert import typed
from arbor_core.plugins import Plugins
from arbor_core.types import AttemptOrder, ConfigError, Launcher, RanksCommand

RANK = ("-m", "arbor_core.worker.main", ".")
"""What each rank runs, in the attempt's directory; the interpreter before it is the launcher's."""


@dataclass(frozen=True)
class ConfiguredLauncher:
    """A launcher with its options."""

    launcher: Launcher
    options: Any = None

    @classmethod
    def of(cls, plugins: Plugins, values: Mapping[str, Any]) -> Self:
        """The launcher of the configuration `launcher`.

        Raises:
            ArborError: no plugin brings it, or an option is not one of its own.
        """
        options = dict(values)
        name = options.pop("name", None)
        if not isinstance(name, str):
            message = "Missing required parameter: 'launcher.name'. Choose one with launcher=NAME."
            raise ConfigError(message, path="launcher.name", code="missing_required_parameter")
        launcher: Launcher = plugins.get("launchers", name)
        return cls(launcher, typed(options, launcher.options, where="launcher"))

    def order(self, order: AttemptOrder, ranks: int) -> AttemptOrder:
        """An order to start so many ranks; for one it stays as it is."""
        command = self.launcher.command(self.options, order.python, ranks) if ranks > 1 else None
        if command is None:
            return order
        return msgspec.structs.replace(order, argv=(*command.argv, *RANK), env={**command.env, **order.env})


def accelerate(config: Path) -> ConfiguredLauncher:
    """What the key `accelerate_config` means, until a launcher of that name takes it over.

    Args:
        config: accelerate's configuration file. It may name several machines: nothing is kept to loopback.
    """

    def command(options: None, python: str, ranks: int) -> RanksCommand:
        module = (python, "-m", "accelerate.commands.launch")
        return RanksCommand((*module, "--config_file", str(config.absolute()), "--num_processes", str(ranks)))

    return ConfiguredLauncher(Launcher(msgspec.Struct, command))
