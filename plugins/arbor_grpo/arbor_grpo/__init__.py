"""GRPO driven by any client: names and types only. The server imports this; `train` is imported by workers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from arbor_trl import (
    FORMER_VALUES,
    Attention,
    Auto,
    Count,
    Dtype,
    LoraSettings,
    Positive,
    Probes,
    Seconds,
    TrainingVersion,
    trl_trainer,
)
from msgspec import Meta

from arbor_core import RolloutConfig, Trainer, hookimpl

if TYPE_CHECKING:
    from arbor_core import Services

NotNegative = Annotated[float, Meta(ge=0)]
UpToOne = Annotated[float, Meta(gt=0, le=1)]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
SamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class GrpoConfig(RolloutConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`conf/trainer/grpo.yaml`, typed. What a key means is said there."""

    max_steps: Count | None
    learning_rate: Positive | Auto
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    warmup_steps: Annotated[int, Meta(ge=0)]
    weight_decay: NotNegative
    max_grad_norm: NotNegative
    loss_type: LossType
    epsilon: Positive
    epsilon_high: Positive | None
    delta: Positive | None
    sapo_temperature_pos: Positive
    sapo_temperature_neg: Positive
    vespo_k_pos: NotNegative
    vespo_lambda_pos: NotNegative
    vespo_k_neg: NotNegative
    vespo_lambda_neg: NotNegative
    importance_sampling_level: Literal["token", "sequence"]
    ratio: Literal["sampler", "recomputed"]
    importance_sampling_mode: SamplingMode | None
    importance_sampling_clip_min: Positive | None
    importance_sampling_clip_max: Positive | None
    num_iterations: Annotated[int, Meta(ge=1, le=64)]
    scale_rewards: Literal["group", "batch", "none"]
    beta: NotNegative
    use_bias_correction_kl: bool
    sync_ref_model: bool
    ref_model_mixup_alpha: UpToOne
    ref_model_sync_steps: Count
    top_entropy_quantile: UpToOne
    off_policy_mask_threshold: NotNegative | None
    mask_truncated_completions: bool
    max_completion_length: Count | None
    soft_completion_penalty_length: Count | None
    max_length: Annotated[int, Meta(ge=2)] | None
    lora: LoraSettings | None
    micro_batch_size: Count | Auto
    share_prompts: bool
    gradient_checkpointing: bool
    dtype: Dtype
    attention: Attention
    publish_steps: Count
    checkpoint_steps: Count | None
    keep_checkpoints: Count | None
    probes: Probes
    resume_seconds: Seconds | None
    training_version: TrainingVersion

    former_values: ClassVar[Mapping[str, Any]] = FORMER_VALUES

    def __post_init__(self) -> None:
        """Raises ValueError for keys that contradict one another."""
        if self.lr_scheduler_type in ("linear", "cosine") and self.max_steps is None:
            raise ValueError(f"lr_scheduler_type {self.lr_scheduler_type!r} falls to 0 at max_steps: set max_steps")
        self._check_ratio()
        if self.sync_ref_model and (self.beta == 0 or self.lora is not None):
            raise ValueError("sync_ref_model needs a reference model of its own: beta above 0 and lora null")
        penalty, longest = self.soft_completion_penalty_length, self.max_completion_length
        if penalty is not None and (longest is None or longest <= penalty):
            raise ValueError("soft_completion_penalty_length needs a max_completion_length above it")
        if self.oldest < self.publish_steps - 1:
            raise ValueError(
                f"with publish_steps {self.publish_steps} groups are up to {self.publish_steps - 1} batches old when "
                "they are sampled: raise max_group_age"
            )

    @property
    def oldest(self) -> int:
        """Batches that a group may be older than the policy. Without `max_group_age` as many as those become that are
        sent in the order of their credits: they are sampled up to `max_staleness` batches ahead, from a policy that up
        to `publish_steps` - 1 batches have not reached."""
        return self.max_staleness + self.publish_steps - 1 if self.max_group_age is None else self.max_group_age

    def _check_ratio(self) -> None:
        mode, bounds = (
            self.importance_sampling_mode,
            (self.importance_sampling_clip_min, self.importance_sampling_clip_max),
        )
        if mode and self.ratio != "recomputed":
            raise ValueError(
                "importance_sampling_mode corrects ratios to recomputed probabilities: set ratio recomputed"
            )
        if mode and mode.endswith("truncate") and bounds == (None, None):
            raise ValueError(f"{mode} needs importance_sampling_clip_min or importance_sampling_clip_max")
        if mode and self.loss_type == "vespo" and mode.startswith("sequence"):
            raise ValueError("vespo takes token_truncate or token_mask only")
        if None not in bounds and bounds[0] >= bounds[1]:  # type: ignore[operator]
            raise ValueError("importance_sampling_clip_min has to be below importance_sampling_clip_max")


@hookimpl
def arbor_trainers() -> Mapping[str, Trainer]:
    """`grpo`, by that name."""
    grpo = trl_trainer(GrpoConfig, "arbor_grpo.train:train", methods=("grpo",), min_rows=0, input="rollouts")
    return {"grpo": grpo}


@hookimpl
def arbor_routes(services: Services) -> Sequence[Any]:
    """GRPO's own routes, under `/v1/fine_tuning/grpo`."""
    from .api.routes import routes  # the server's libraries: a worker has no use for them

    return routes(services)
