"""The launchers that come with Arbor: one process for all devices, and torchrun."""

from __future__ import annotations

from msgspec import Struct

from arbor_core.types import Launcher, RanksCommand


class NoOptions(Struct, forbid_unknown_fields=True):
    pass


class CommandOptions(Struct, forbid_unknown_fields=True):
    """A command that the operator wrote."""

    command: list[str]
    env: dict[str, str]

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError("'command' is empty")
        self.filled("", 0)

    def filled(self, python: str, ranks: int) -> tuple[str, ...]:
        """The command, with values in the place of `{python}` and `{ranks}`.

        Raises:
            ValueError: a word has another placeholder.
        """
        try:
            return tuple(word.format_map({"python": python, "ranks": ranks}) for word in self.command)
        except (KeyError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"'command' may hold {{python}} and {{ranks}}, but it has {error}") from None


def from_options(options: CommandOptions, python: str, ranks: int) -> RanksCommand:
    """The operator's command, filled in."""
    return RanksCommand(options.filled(python, ranks), options.env)


NONE = Launcher(NoOptions, lambda options, python, ranks: None)
TORCHRUN = Launcher(CommandOptions, from_options)
