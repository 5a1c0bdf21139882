"""GRPO: one job, from the first group of its inbox to its last checkpoint. TRL's `GRPOTrainer` computes the losses."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import transformers
from accelerate.utils import is_deepspeed_available
from arbor_trl.budget import budget
from arbor_trl.chat import ChatFormat
from arbor_trl.model import adapter, autocast, context, load_model, load_tokenizer, uses_cuda
from arbor_trl.ranks import parting
from datasets import Dataset
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging
from trl.trainer.grpo_config import GRPOConfig as TrlConfig

from arbor_core import JobFailed, Run

from . import GrpoConfig
from .training.publishing import Publisher
from .training.reporting import Reporting
from .training.rows import Reader
from .training.session import Session
from .training.state import Finished
from .training.trainer import NO_END, GroupTrainer

if is_deepspeed_available():  # accelerate would import it in the first step, after a warm process was forked
    import_module("deepspeed")

ADAPTER_RATE, FULL_RATE = 1e-5, 1e-6
CISPO_EPSILON_HIGH = 5.0
"""cispo cuts ratios at epsilon_high itself, not at 1 + epsilon_high; the value TRL recommends."""


@parting()
def train(run: Run[GrpoConfig]) -> None:
    """Train `run.model` on the groups of the inbox until `max_steps`, or until the job is asked to finish.

    Raises:
        JobFailed: the model cannot be used, or the loss diverged.
        JobStopped: asked to pause (after a checkpoint) or cancelled.
    """
    torch.set_num_threads(run.threads)
    transformers.set_seed(run.seed % 2**32)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    last = run.last_checkpoint()
    if last and last.step >= (run.config.max_steps or NO_END):  # the attempt before got so far
        finish(run, last.step, Session.place_of(last).tokens)
        return
    trainer = compose(run)
    session = trainer.session
    if last:
        session.resume(last)
        run.message(f"Resuming after step {last.step}", step=last.step)
    try:
        trainer.train(resume_from_checkpoint=str(last.dir) if last else None)
    except Finished:
        run.message(f"Training ends after step {session.step}, as asked")
    session.conclude()
    if run.rank == 0:
        finish(run, session.step, session.place.tokens)


def compose(run: Run[GrpoConfig]) -> GroupTrainer:
    """TRL's trainer and what it is fed with."""
    if run.adapter and run.config.lora is None:
        raise JobFailed(
            "lora is null, but the model is an adapter, which can only be trained as one: leave lora out",
            code="invalid_hyperparameters",
            param="hyperparameters",
        )
    tokenizer, model = load_tokenizer(run), load_model(run)
    limits = budget(run, model)
    chat = chat_format(run, tokenizer)
    longest = min(run.config.max_length or context(model, tokenizer), context(model, tokenizer))
    reader = Reader(run.config, chat, int(model.config.get_text_config().vocab_size), longest)
    name_ends(run, model, chat)
    session = Session(run, reader)
    peft_config = adapter(run.config.lora) if run.config.lora and not run.adapter else None
    policy: Any = PeftModel.from_pretrained(model, run.adapter, is_trainable=True) if run.adapter else model
    try:
        trainer = GroupTrainer(
            run,
            session,
            limits,
            model=policy,
            reward_funcs=sent_rewards,
            args=arguments(run, longest),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
            peft_config=peft_config,
            callbacks=[Reporting(run, session)],
        )
    except ValueError as error:  # PEFT finds no such module
        if run.config.lora is None:
            raise
        raise JobFailed(f"lora: {error}", code="invalid_hyperparameters", param="hyperparameters") from error
    trainer.remove_callback(PrinterCallback)
    session.trainer, session.publisher = trainer, Publisher(run, trainer, tokenizer)
    describe(run, trainer)
    return trainer


def sent_rewards(**_: Any) -> list[float]:
    """TRL wants a reward function. Ours come with the rollouts.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("TRL has asked for a reward itself: its trainer is not the one that arbor-grpo was made for")


def chat_format(run: Run[GrpoConfig], tokenizer: PreTrainedTokenizerBase) -> ChatFormat | None:
    """None: rollouts must come as tokens."""
    try:
        return ChatFormat(tokenizer)
    except ValueError as error:
        run.message(f"Groups of text will be rejected: {error}", "warn")
        return None


def name_ends(run: Run[GrpoConfig], model: PreTrainedModel, chat: ChatFormat | None) -> None:
    """Let generation end where it ended for the adapter that training begins with, and at the token that ends a turn:
    the model may know another one only."""
    ends = model.generation_config.eos_token_id
    known = set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
    if run.adapter and (run.adapter / "generation_config.json").is_file():
        said = GenerationConfig.from_pretrained(run.adapter).eos_token_id
        known |= set() if said is None else {said} if isinstance(said, int) else set(said)
    if chat:
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (sample,) = chat.encode([chat.turn(chat.chats.conversation(said, None), 1)])
        known |= {sample.last_trained} & chat.stop_ids
    model.generation_config.eos_token_id = sorted(known) or None


def arguments(run: Run[GrpoConfig], longest: int) -> TrlConfig:
    """What the config means in TRL's words. Saving and logging is ours; a step is one batch to TRL."""
    config = run.config
    return TrlConfig(
        output_dir=str(run.work / "trainer"),
        **options(config),
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
        bf16=autocast(run),
        use_cpu=not uses_cuda(run),
        dataloader_pin_memory=uses_cuda(run),
        seed=run.seed % 2**32,
        ignore_data_skip=True,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
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


def options(config: GrpoConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in SAME}


def learning_rate(config: GrpoConfig) -> float:
    if config.learning_rate != "auto":
        return config.learning_rate
    return ADAPTER_RATE if config.lora else FULL_RATE


def describe(run: Run[GrpoConfig], trainer: GroupTrainer) -> None:
    parameters = list(trainer.policy.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    run.resolved(learning_rate=learning_rate(run.config))
    run.message(
        f"Training {trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters on "
        f"{trainer.accelerator.device.type}: {run.config.groups_per_step} groups a step, waiting for them"
    )


def finish(run: Run[GrpoConfig], step: int, tokens: int) -> None:
    """Name the last step's checkpoint as the job's model."""
    found = run.last_checkpoint()
    if found is None or found.step != step:
        raise JobFailed(f"the checkpoint of the last step, {step}, is lost", code="checkpoint_lost")
    run.finish(found, tokens, adapter=run.config.lora is not None)
