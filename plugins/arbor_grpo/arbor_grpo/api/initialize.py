"""From the configuration that GRPO's clients send to a job of ours: keys, units and words are translated.

What has no meaning here becomes a warning of the job: a client that sends twenty keys shall not fail for one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import msgspec

from arbor_core import ConfigError, RolloutConfig
from arbor_core.http import ApiError, strip_provider, typed

from .requests import InitializeRequest

METHOD = "grpo"
WHERE = f"method.{METHOD}.hyperparameters"
MAX_GROUP_AGE = 64
"""Age in batches that groups may have whose clients say nothing of staleness: they sample ahead of their batch ids,
and throw nothing away."""

MOST_KEYS = 1024
"""Of a configuration. Each costs time in which the server does nothing else."""
SHOWN = 20
"""Unknown keys that are named, each with the nearest that is known."""

RENAMED = {
    "gradient_accumulation_steps": "groups_per_step",
    "max_seq_len": "max_length",
    "max_context_length": "max_length",
    "lora_config": "lora",
    **RolloutConfig.former_keys,
}
LORA = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
MEANINGLESS = frozenset(
    {
        *(
            "per_device_train_batch_size",
            "generation_batch_size",
            "num_batches_ahead",
            "update_interval",
            "grpo_flavor",
        ),
        *("max_prompt_length", "gradient_checkpointing_kwargs", "bf16", "fp16", "optim", "top_p", "top_k"),
        *("repetition_penalty", "report_to", "wandb_kwargs", "log_completions", "logging_steps"),
        *("async_generation_timeout", "vllm_server_timeout"),
    }
)
"""Keys of the original that nothing corresponds to."""
OUTER = {*InitializeRequest.__struct_fields__, "job_id"}


class TranslatedRequest(msgspec.Struct):
    """A request of a job as the core takes it."""

    request: dict[str, Any]
    warnings: list[str]
    paths: dict[str, str]
    """Where the client wrote what became this hyperparameter."""


def translate(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> TranslatedRequest:
    """The body of `initialize` as the body of `POST /v1/fine_tuning/jobs`.

    Args:
        defaults: What the trainer's hyperparameters are without it.

    Raises:
        ConfigError: a key that is used has a wrong type.
        ApiError: there are far too many keys.
    """
    body = typed(dict(raw), InitializeRequest, "")
    given = by_path(raw)
    if len(given) > MOST_KEYS:
        raise ApiError(400, f"A configuration of {len(given)} keys: expected at most {MOST_KEYS}.", "invalid_value")
    hyperparameters, paths, remarks = hyperparameters_of(given, defaults)
    if not hyperparameters.keys() & {"max_group_age", "max_staleness"}:
        hyperparameters["max_group_age"] = MAX_GROUP_AGE
    request = {
        "model": strip_provider(body.model),
        "method": {"type": METHOD, METHOD: {"hyperparameters": hyperparameters}},
        "suffix": body.suffix,
        "metadata": {"run_name": body.run_name[:512]} if body.run_name else None,
        "num_gpus": training_gpus(body, given),
        "seed": next((value for path, value in given.items() if path.rpartition(".")[2] == "seed"), None),
    }
    request = {key: value for key, value in request.items() if value is not None}
    return TranslatedRequest(request, remarks, paths)


def hyperparameters_of(
    given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """What a client has set as hyperparameters of ours, the path of each, and warnings of the rest."""
    hyperparameters: dict[str, Any] = {}
    paths: dict[str, str] = {}
    unused: list[str] = []
    remarks: list[str] = []
    for path, value in given.items():
        key = path.rpartition(".")[2]
        found = translate_key(key, value)
        if found and found[0] in defaults:
            if hyperparameters.setdefault(*found) != found[1]:
                remarks.append(f"'{paths[found[0]]}' was used, and '{path}', which means the same, was not.")
            elif key in RolloutConfig.former_keys:
                remarks.append(
                    f"'{path}' is called '{found[0]}' now: the former name will be removed in a later version."
                )
            paths.setdefault(found[0], path)
        elif key not in ("seed", "num_training_gpus", "lora"):
            unused.append(key)
    return hyperparameters, paths, remarks + warnings(unused, defaults)


def by_path(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a trainer's configuration by the path at which the client wrote them; nulls say nothing."""
    trainer, inference = raw.get("trainer_config") or {}, raw.get("inference_config") or {}
    lengths = ("max_seq_len", "max_context_length")
    found = {f"trainer_config.{key}": value for key, value in trainer.items()}
    found |= {key: value for key, value in raw.items() if key not in OUTER}
    found |= {f"inference_config.{key}": inference[key] for key in lengths if key in inference}
    return {path: value for path, value in found.items() if value is not None}


def translate_key(key: str, value: Any) -> tuple[str, Any] | None:
    """A key and its value in our words; None where it says nothing to us."""
    if key == "lora":
        return None if value is True else ("lora", None if value is False else value)
    if key in MEANINGLESS or key in ("seed", "num_training_gpus"):
        return None
    if key == "scale_rewards" and isinstance(value, bool):
        value = "group" if value else "none"
    if key == "lora_config" and isinstance(value, Mapping):
        value = {
            LORA.get(name, name): setting
            for name, setting in value.items()
            if setting is not None and name != "task_type"
        }
    return RENAMED.get(key, key), value


def training_gpus(body: InitializeRequest, given: Mapping[str, Any]) -> Any:
    """How many devices to train on."""
    count = next((value for path, value in given.items() if path.rpartition(".")[2] == "num_training_gpus"), None)
    if count is None and body.gpu_config and body.gpu_config.multi:
        count = body.gpu_config.multi.num_training_gpus
    return count


def warnings(unused: list[str], defaults: Mapping[str, Any]) -> list[str]:
    """What to tell the job's author of keys that were not used."""
    known = [*defaults, *RENAMED]
    found = []
    if unknown := list(dict.fromkeys(key for key in unused if key not in MEANINGLESS)):
        shown = ", ".join(f"'{key[:80]}'{hint(key[:80], known)}" for key in unknown[:SHOWN])
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        found.append(f"These keys are not known here and were not used: {shown}{more}.")
    if names := sorted({key for key in unused if key in MEANINGLESS}):
        found.append(f"These keys have no meaning on this server and were not used: {', '.join(names)}.")
    return found


def hint(key: str, known: list[str]) -> str:
    """The nearest of the keys that are known, or nothing."""
    near = get_close_matches(key, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near and near[0] != key else ""


def with_clients_path(error: ConfigError | ApiError, paths: Mapping[str, str]) -> ConfigError | ApiError:
    """An error about a job's request as one about the body that the client sent."""
    path = error.path if isinstance(error, ConfigError) else error.param
    if not path or not path.startswith(WHERE):
        return error
    ours, _, rest = path.removeprefix(f"{WHERE}.").partition(".")
    theirs = ".".join(filter(None, (paths.get(ours, ours), rest)))
    message = str(error).replace(path, theirs)
    if isinstance(error, ConfigError):
        return ConfigError(message, path=theirs, code=error.code)
    return ApiError(error.status, message, error.code, theirs, error.headers)
