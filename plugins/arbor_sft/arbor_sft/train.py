"""Supervised fine-tuning: one job, from its files to its checkpoints. TRL's `SFTTrainer` does the training."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch
import transformers
from accelerate.utils import is_deepspeed_available
from arbor_trl.budget import Budget, budget
from arbor_trl.chat import ChatFormat
from arbor_trl.model import adapter, autocast, context, load_model, load_tokenizer, unavailable, uses_cuda
from arbor_trl.ranks import parting
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig as TrlConfig
from trl.trainer.sft_trainer import SFTTrainer

from arbor_core import JobFailed, Run

from . import SftConfig, auto, plan, rows
from .batches import Collate
from .model import tells_rows_apart
from .plan import Layout, Plan
from .reporting import Evaluation, Reporting
from .rows import Samples
from .saving import SavingTrainer

if is_deepspeed_available():  # accelerate would import it in the first step, after a warm process was forked
    import_module("deepspeed")

EVALUATION_ROWS = 32
"""Most rows of a micro-batch in evaluation."""


@parting()
def train(run: Run[SftConfig]) -> None:
    """Train `run.model` on `run.training_file`; the last checkpoint is the result.

    Raises:
        JobFailed: the model or the data cannot be used, or the loss diverged.
        JobStopped: asked to pause (after a checkpoint) or cancelled.
    """
    torch.set_num_threads(run.threads)
    transformers.set_seed(run.seed % 2**32)
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = load_tokenizer(run)
    chat = chat_format(run, tokenizer)
    model = load_model(run)
    training, validation = load_files(run, chat, context(model, tokenizer))
    stop_where_trained(model, chat, training)
    layout = choose_layout(run, model, training)
    limits = budget(run, model)
    schedule = make_plan(run, training, layout, limits)
    trainer = compose(run, model, tokenizer, training, validation, schedule, layout)
    describe(run, trainer.model_wrapped, training, validation, schedule)
    resume(run, trainer, len(schedule.steps))
    if run.rank == 0:
        finish(run, schedule)


def chat_format(run: Run[SftConfig], tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    try:
        return ChatFormat(tokenizer)
    except ValueError as error:
        raise unavailable(run, "chat template", error) from None


def load_files(run: Run[SftConfig], chat: ChatFormat, longest: int) -> tuple[Samples, Samples | None]:
    """Both files as tokens; rows that are too long are counted in one warning for each file."""
    length = min(run.config.max_length or longest, longest)

    def load(path: Path, param: str) -> Samples:
        samples = rows.load(path, chat, length, run.config.too_long, param)
        if samples.truncated or samples.skipped:
            run.message(
                f"{param}: of {samples.rows} examples, {samples.truncated} were cut to {length} tokens and "
                f"{samples.skipped} skipped",
                "warn",
                truncated=samples.truncated,
                skipped=samples.skipped,
            )
        return samples

    validation = load(run.validation_file, "validation_file") if run.validation_file else None
    return load(run.training_file, "training_file"), validation


def stop_where_trained(model: PreTrainedModel, chat: ChatFormat, training: Samples) -> None:
    """Let generation end at the tokens that ended the turns it learned; a base model may know another one only.
    Full weights are saved with it; `Reporting` writes it beside an adapter, where the embedded engine reads it."""
    generation = model.generation_config
    known = generation.eos_token_id
    known = [] if known is None else known if isinstance(known, list) else [known]
    learned = {sample.last_trained for sample in training.kept} & chat.stop_ids
    if new := sorted(learned - set(known)):
        generation.eos_token_id = [*known, *new]


def choose_layout(run: Run[SftConfig], model: PreTrainedModel, training: Samples) -> Layout:
    """`auto` as a layout.

    Raises:
        JobFailed: rows are to be packed, but this model mixes them up.
    """
    wanted = run.config.batching
    if wanted == "auto":
        wanted = "packed" if "flash" in str(model.config._attn_implementation) else "sorted"
    if uses_cuda(run):
        model.to("cuda")  # type: ignore[arg-type]  # transformers wraps torch's method
    if wanted == "packed" and not tells_rows_apart(model, training.kept):
        if run.config.batching == "packed":
            raise JobFailed(
                f"batching is 'packed', but {run.model} does not tell packed rows apart by position: use 'sorted'",
                code="invalid_hyperparameters",
                param="hyperparameters",
            )
        return "sorted"
    return wanted


def make_plan(run: Run[SftConfig], training: Samples, layout: Layout, limits: Budget) -> Plan:
    """Resolve "auto", report it, and lay out all steps."""
    config, count = run.config, len(training.kept)
    epochs, batch_size = auto.n_epochs(config, training.rows), auto.batch_size(config, training.rows)
    run.resolved(n_epochs=epochs, batch_size=batch_size, learning_rate_multiplier=auto.multiplier(config))
    return plan.make(
        training.lengths,
        batch_size=min(batch_size, count),
        epochs=epochs,
        max_steps=config.max_steps,
        seed=run.seed,
        layout=layout,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
        budget=limits,
        ranks=run.world_size,
        share=run.micro_batch_share,
    )


def compose(
    run: Run[SftConfig],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training: Samples,
    validation: Samples | None,
    schedule: Plan,
    layout: Layout,
) -> SFTTrainer:
    """TRL's trainer over the plan: an item of its data set is a micro-batch, by row numbers."""
    pad = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    packed = layout == "packed"
    evaluation = None
    if validation:
        limits, share = budget(run, model), run.micro_batch_share
        limits = replace(limits, tokens=int(limits.tokens * share))
        cuts = plan.evaluation(validation.lengths, layout, int(EVALUATION_ROWS * share), limits)
        evaluation = Evaluation(cuts, Collate(validation.kept, pad, packed))
    reporting = Reporting(run, schedule, training.kept, evaluation)
    try:
        trainer = SavingTrainer(
            run,
            lambda: reporting.metrics,
            model=model,
            args=arguments(run, schedule),
            train_dataset=Dataset.from_dict({"rows": schedule.micro_batches}),
            data_collator=Collate(training.kept, pad, packed),
            processing_class=tokenizer,
            callbacks=[reporting],
            peft_config=adapter(run.config.lora) if run.config.lora else None,
        )
    except ValueError as error:  # PEFT finds no such module
        if run.config.lora is None:
            raise
        raise JobFailed(f"lora: {error}", code="invalid_hyperparameters", param="hyperparameters") from error
    # TRL's loss divides by the step's tokens itself, whatever the model's forward accepts.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    reporting.trainer = trainer
    return trainer


def arguments(run: Run[SftConfig], schedule: Plan) -> TrlConfig:
    """What the plan and the config mean in TRL's words. Saving and logging is `Reporting`'s."""
    config, steps = run.config, len(schedule.steps)
    return TrlConfig(
        output_dir=str(run.work / "trainer"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=schedule.parts // run.world_size,
        max_steps=steps,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        learning_rate=auto.learning_rate(config),
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(steps * config.warmup_ratio),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=autocast(run),
        use_cpu=not uses_cuda(run),
        dataloader_pin_memory=uses_cuda(run),
        seed=run.seed % 2**32,
        save_strategy="no",
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


def describe(
    run: Run[SftConfig], model: torch.nn.Module, training: Samples, validation: Samples | None, schedule: Plan
) -> None:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    run.message(
        f"Training {trained:,} of {every:,} parameters on {next(model.parameters()).device.type}: {training.rows} "
        f"examples ({sum(training.lengths):,} tokens), {validation.rows if validation else 0} for validation, "
        f"{len(schedule.steps)} steps of {schedule.parts} micro-batches"
    )


def resume(run: Run[SftConfig], trainer: SFTTrainer, total: int) -> None:
    """Train from the newest checkpoint to the end; nothing is left to do if that is the last step's."""
    last = run.last_checkpoint()
    if last and last.step >= total:
        return
    if last:
        run.message(f"Resuming after step {last.step} of {total}", step=last.step)
    trainer.train(resume_from_checkpoint=str(last.dir) if last else None)


def finish(run: Run[SftConfig], schedule: Plan) -> None:
    last = run.last_checkpoint()
    if last is None or last.step != len(schedule.steps):
        newest = f"step {last.step}'s" if last else "none"
        raise JobFailed(f"the last step's checkpoint is lost; the newest whole one is {newest}", code="checkpoint_lost")
    run.finish(last, schedule.tokens, adapter=run.config.lora is not None)
