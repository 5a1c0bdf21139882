"""What the names in the settings choose: trainers with their defaults, and the plugins' parts of a server."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from arbor_core.config import compose, convert
from arbor_core.config.settings import ServeConfig
from arbor_core.inference.backends import Backend, Backends
from arbor_core.plugins import Plugins
from arbor_core.types import (
    Allocator,
    AllocatorSettings,
    ArborError,
    Executor,
    ExecutorSettings,
    Scheduler,
    free_by_node,
)
from arbor_core.worker.launchers import ConfiguredLauncher, accelerate

from .submission import TrainerDefaults

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """What the names in the settings stand for."""

    trainers: Mapping[str, TrainerDefaults]
    default_trainer: str | None
    scheduler: Scheduler
    allocator: Allocator
    executor: Executor
    launcher: ConfiguredLauncher
    backends: Backends


def choose(settings: ServeConfig, plugins: Plugins, default_trainer: str | None) -> Chosen:
    """Look up what the settings name.

    Raises:
        ArborError: a name that no plugin brings, a device that is not there, or an allocator of several nodes that does
            not say what is free on each.
    """
    if default_trainer:
        plugins.get("trainers", default_trainer)  # says which name is near
    trainers = trainer_defaults(settings, plugins, default_trainer)
    scheduler = plugins.get("schedulers", settings.scheduler)()
    allocator = plugins.get("allocators", settings.allocator)(
        AllocatorSettings(settings.gpu.train_ids, settings.gpu.inference_ids, settings.limits.engines)
    )
    free_by_node(allocator)  # refuses one that cannot say
    runtime = settings.storage.absolute() / "run"
    executor = plugins.get("executors", settings.executor)(ExecutorSettings(settings.start, runtime))
    launcher = launcher_of(settings, plugins)
    backends = open_backends(settings, plugins)
    return Chosen(trainers, default_trainer, scheduler, allocator, executor, launcher, backends)


def check_paths(settings: ServeConfig) -> None:
    """Refuse paths that do not exist: later they would look like an unknown model, or fail every job.

    Raises:
        ArborError: with the path.
    """
    for folder in settings.models.dirs:
        if not folder.is_dir():
            raise ArborError(f"models.dirs: there is no folder {folder}")
    if settings.accelerate_config and not settings.accelerate_config.is_file():
        raise ArborError(f"accelerate_config: there is no file {settings.accelerate_config}")


def trainer_defaults(
    settings: ServeConfig, plugins: Plugins, default_trainer: str | None
) -> dict[str, TrainerDefaults]:
    """Every installed trainer with its YAML, and the command line's settings over it; all of it type-checked.

    Raises:
        ConfigError: a value that the trainer's struct does not take.
    """
    found = {}
    for name, trainer in plugins.all("trainers").items():
        values = compose.defaults("trainer", name)
        where = f"trainers.{name}"
        if name == default_trainer and settings.trainer:
            values, where = settings.trainer, "trainer"
        values, warnings = convert.renamed(values, trainer.config, where)
        more, further = convert.renamed(settings.trainers.get(name, {}), trainer.config, f"trainers.{name}")
        for warning in dict.fromkeys([*warnings, *further]):
            log.warning("configuration of the trainer %s: %s", name, warning)
        values = convert.merged(values, more)
        convert.typed(values, trainer.config, where=where)
        found[name] = TrainerDefaults(trainer, values)
    for name in settings.trainers:
        plugins.get("trainers", name)  # says which name is near
    return found


def open_backends(settings: ServeConfig, plugins: Plugins) -> Backends:
    """The inference backends that the settings name, with their options: each one's YAML, and the settings over it.

    Raises:
        ArborError: a backend that no plugin brings; ConfigError: an option that a backend does not take.
    """
    default = settings.inference.default
    found = {}
    for name in dict.fromkeys([default, *settings.inference.models.values(), *settings.engines]):
        backend = plugins.get("inference_backends", name)()
        options = convert.merged(compose.defaults("backend", name), settings.engines.get(name, {}))
        convert.typed(options, backend.options, where=f"engines.{name}")
        if name == default:
            options = convert.merged(options, settings.engine)
            convert.typed(options, backend.options, where="engine")
        found[name] = Backend(name, backend, options)
    return Backends(found[default], found, settings.inference.models, settings.inference.replicas)


def launcher_of(settings: ServeConfig, plugins: Plugins) -> ConfiguredLauncher:
    """Who starts the ranks of a job with several devices.

    Raises:
        ArborError: no plugin brings it, or an option is not one of its own.
    """
    chosen = ConfiguredLauncher.of(plugins, settings.launcher)
    if settings.accelerate_config is None:
        return chosen
    log.warning(
        "accelerate_config: accelerate starts the ranks of jobs, and not launcher=%s; the key will become options of "
        "launcher=accelerate",
        settings.launcher["name"],
    )
    return accelerate(settings.accelerate_config)
