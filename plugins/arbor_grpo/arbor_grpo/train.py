"""GRPO: one job, from the first group of its inbox to its last checkpoint. TRL's `GRPOTrainer` computes the losses."""

from __future__ import annotations

from typing import Any

from arbor_trl.budget import budget
from arbor_trl.chat import ChatFormat
from arbor_trl.job import lora_errors, parameter_counts, process_group, set_up, trl_arguments
from arbor_trl.model import add_end_tokens, begin, context, load_model, load_tokenizer
from arbor_trl.result import finish
from arbor_trl.steps import IdleSteps
from arbor_trl.vocabulary import Padding, Vocabulary
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.grpo_config import GRPOConfig as TrlConfig

from arbor_core import RolloutRun

from . import GrpoConfig
from .training.publishing import Publisher
from .training.reporting import Reporting
from .training.rows import Reader
from .training.session import FinishRequested, Session, progress_of
from .training.trainer import GroupTrainer

NO_END = 10**9
"""Steps of a run without `max_steps`."""
ADAPTER_RATE, FULL_RATE = 1e-5, 1e-6
CISPO_EPSILON_HIGH = 5.0
"""cispo cuts ratios at epsilon_high itself, not at 1 + epsilon_high; the value TRL recommends."""


@process_group()
def train(run: RolloutRun[GrpoConfig]) -> None:
    """Train `run.model` on the groups of the inbox until `max_steps`, or until the job is to finish.

    Raises:
        JobFailed: the model cannot be used, or the loss diverged.
        JobStopped: the job is to pause (its checkpoint is written) or was cancelled.
    """
    set_up(run)
    last = run.last_checkpoint()
    if last and last.step >= (run.config.max_steps or NO_END):  # the attempt before got so far
        finish(run, last.step, progress_of(last).tokens)
        return
    session = compose(run)
    if last:
        session.resume(last)
        run.message(f"Resuming after step {last.step}", step=last.step)
    try:
        session.trainer.train(resume_from_checkpoint=str(last.dir) if last else None)
    except FinishRequested:
        run.message(f"Training ends after step {session.step}, as asked")
    session.conclude()
    policy = session.trainer.accelerator.unwrap_model(session.trainer.model)
    finish(run, session.step, session.progress.tokens, policy)


def compose(run: RolloutRun[GrpoConfig]) -> Session:
    """TRL's trainer, and what gives it batches."""
    tokenizer, model = load_tokenizer(run), load_model(run)
    limits = budget(run, model)
    chat, vocabulary = chat_format(run, tokenizer), Vocabulary.of(model, tokenizer)
    longest = min(run.config.max_length or context(model, tokenizer), context(model, tokenizer))
    policy, new_adapter = begin(run, model)
    add_end_tokens(model, chat.turn_end() if chat else ())
    with lora_errors(run.config.lora):
        trainer = GroupTrainer(
            run,
            limits,
            vocabulary.padding,
            model=policy,
            reward_funcs=no_reward,
            args=arguments(run, longest),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
            peft_config=new_adapter,
        )
    reader = Reader(run.config, chat, vocabulary, longest)
    session = Session(run, reader, trainer, Publisher(run, trainer, tokenizer))
    trainer.source = session
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Padding(vocabulary, model))
    trainer.add_callback(Reporting(run, session))
    if run.config.training_version > 1:
        trainer.add_callback(IdleSteps())
    run.resolved(learning_rate=learning_rate(run.config))
    run.message(f"{parameter_counts(trainer.policy)}: {run.config.groups_per_step} groups a step, waiting for them")
    return session


def no_reward(**_: Any) -> list[float]:
    """TRL wants a function that rewards. Here rewards come with the rollouts.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("TRL wants to compute rewards itself: arbor-grpo was not written for this version of it")


def chat_format(run: RolloutRun[GrpoConfig], tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """None: rollouts must come as tokens."""
    try:
        return ChatFormat(tokenizer)
    except ValueError as error:
        run.message(f"Groups of text will be rejected: {error}", "warn")
        return None


def arguments(run: RolloutRun[GrpoConfig], longest: int) -> TrlConfig:
    """What the config means in TRL's words. A step is one batch to TRL."""
    config = run.config
    return TrlConfig(
        **trl_arguments(run),
        **{key: getattr(config, key) for key in SAME},
        per_device_train_batch_size=config.num_generations,
        gradient_accumulation_steps=1,
        max_steps=config.max_steps or NO_END,
        max_completion_length=config.max_completion_length or longest,
        epsilon_high=config.epsilon_high or (CISPO_EPSILON_HIGH if config.loss_type == "cispo" else None),
        vllm_importance_sampling_mode=config.importance_sampling_mode or "token_truncate",
        vllm_importance_sampling_clip_min=config.importance_sampling_clip_min,
        vllm_importance_sampling_clip_max=config.importance_sampling_clip_max,
        vllm_importance_sampling_correction=config.importance_sampling_mode is not None,
        learning_rate=learning_rate(config),
        ignore_data_skip=True,
    )


SAME = (
    "num_generations",
    "temperature",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "loss_type",
    "epsilon",
    "delta",
    "sapo_temperature_pos",
    "sapo_temperature_neg",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "importance_sampling_level",
    "num_iterations",
    "scale_rewards",
    "beta",
    "use_bias_correction_kl",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "top_entropy_quantile",
    "off_policy_mask_threshold",
    "gradient_checkpointing",
)
"""Keys that mean the same to TRL."""


def learning_rate(config: GrpoConfig) -> float:
    if config.learning_rate != "auto":
        return config.learning_rate
    return ADAPTER_RATE if config.lora else FULL_RATE
