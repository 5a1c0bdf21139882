"""Supervised fine-tuning: one job, from its files to its checkpoints. TRL's `SFTTrainer` does the training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from arbor_trl.budget import Budget, budget
from arbor_trl.chat import ChatFormat
from arbor_trl.job import lora_errors, parameter_counts, process_group, set_up, trl_arguments
from arbor_trl.model import add_end_tokens, begin, context, load_model, load_tokenizer, unavailable, uses_cuda
from arbor_trl.result import finish
from arbor_trl.steps import IdleSteps
from arbor_trl.vocabulary import Padding, Vocabulary
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.sft_config import SFTConfig as TrlConfig

from arbor_core import FileRun, JobFailed

from . import SftConfig, plan, rows
from .batches import Collate, tells_rows_apart
from .plan import Layout, Plan
from .reporting import Evaluation, Reporting, RunTrainer
from .rows import Samples

ADAPTER_RATE, FULL_RATE = 2e-4, 2e-5
EVALUATION_ROWS = 32
"""Most rows of a micro-batch in evaluation."""


@process_group()
def train(run: FileRun[SftConfig]) -> None:
    """Train `run.model` on `run.training_file`. The last checkpoint is the result, the best one where
    `early_stopping_patience` is set.

    Raises:
        JobFailed: the model or the data cannot be used, or the loss diverged.
        JobStopped: the job is to pause (its checkpoint is written) or was cancelled.
    """
    set_up(run)
    check_patience(run)
    tokenizer = load_tokenizer(run)
    chat = chat_format(run, tokenizer)
    model = load_model(run)
    vocabulary = Vocabulary.of(model, tokenizer)
    training, validation = load_files(run, chat, context(model, tokenizer))
    for param, samples in (("training_file", training), ("validation_file", validation)):
        vocabulary.check_rows(param, ((sample.line, sample.ids) for sample in samples.kept) if samples else ())
    add_end_tokens(model, chat.learned_ends(training.kept))
    layout = choose_layout(run, model, training)
    limits = budget(run, model)
    schedule = make_plan(run, training, layout, limits)
    trainer = compose(run, model, vocabulary, training, validation, schedule, layout)
    run.message(
        f"{parameter_counts(trainer.model_wrapped)}: {training.rows} examples ({sum(training.lengths):,} tokens), "
        f"{validation.rows if validation else 0} for validation, {len(schedule.steps)} steps of {schedule.parts} "
        "micro-batches"
    )
    steps = train_from_last(run, trainer, len(schedule.steps))
    tokens = schedule.tokens_of(steps, training.lengths)
    finish(run, trainer.reporting.result(steps), tokens, trainer.accelerator.unwrap_model(trainer.model))


def check_patience(run: FileRun[SftConfig]) -> None:
    """Refuse to stop early for want of progress that nobody measures.

    Raises:
        JobFailed: `invalid_hyperparameters`.
    """
    if run.config.early_stopping_patience and run.validation_file is None:
        raise JobFailed(
            "early_stopping_patience looks at the validation loss, and the job has no validation_file: give one, or "
            "leave it out",
            code="invalid_hyperparameters",
            param="hyperparameters",
        )


def chat_format(run: FileRun[SftConfig], tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    try:
        return ChatFormat(tokenizer)
    except ValueError as error:
        raise unavailable(run, "chat template", error) from None


def load_files(run: FileRun[SftConfig], chat: ChatFormat, longest: int) -> tuple[Samples, Samples | None]:
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
        if len(samples.lengths) > samples.rows:
            tokens, learned = sum(samples.lengths), sum(sample.trained for sample in samples.kept)
            run.message(
                f"{param}: the model's chat template rewrites earlier turns, so {samples.rows} examples became "
                f"{len(samples.lengths)} sequences of {tokens:,} tokens, of which {learned:,} are learned",
                "warn",
            )
        return samples

    validation = load(run.validation_file, "validation_file") if run.validation_file else None
    return load(run.training_file, "training_file"), validation


def choose_layout(run: FileRun[SftConfig], model: PreTrainedModel, training: Samples) -> Layout:
    """`auto` as a layout.

    Raises:
        JobFailed: rows are to be packed, but this model mixes them up.
    """
    layout = run.config.batching
    if layout == "auto":
        layout = "packed" if "flash" in str(model.config._attn_implementation) else "sorted"
    if uses_cuda(run):
        model.to("cuda")  # type: ignore[arg-type]  # transformers wraps torch's method
    if layout == "packed" and not tells_rows_apart(model, training.kept):
        if run.config.batching == "packed":
            raise JobFailed(
                f"batching is 'packed', but {run.model} does not tell packed rows apart by position: use 'sorted'",
                code="invalid_hyperparameters",
                param="hyperparameters",
            )
        return "sorted"
    return layout


def make_plan(run: FileRun[SftConfig], training: Samples, layout: Layout, limits: Budget) -> Plan:
    """Resolve "auto", report it, and lay out all steps."""
    config, count = run.config, len(training.kept)
    epochs, batch_size = plan.n_epochs(config, training.rows), plan.batch_size(config, training.rows)
    run.resolved(n_epochs=epochs, batch_size=batch_size, learning_rate_multiplier=rate_multiplier(config))
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
    run: FileRun[SftConfig],
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    training: Samples,
    validation: Samples | None,
    schedule: Plan,
    layout: Layout,
) -> RunTrainer:
    """TRL's trainer over the plan: an item of its data set is a micro-batch, by row numbers."""
    packed = layout == "packed"
    evaluation = None
    if validation:
        limits, share = budget(run, model), run.micro_batch_share
        limits = replace(limits, tokens=int(limits.tokens * share))
        cuts = plan.evaluation(validation.lengths, layout, int(EVALUATION_ROWS * share), limits)
        evaluation = Evaluation(cuts, Collate(validation.kept, vocabulary.padding, packed))
    reporting = Reporting(run, schedule, training.kept, evaluation)
    policy, new_adapter = begin(run, model)
    with lora_errors(run.config.lora):
        trainer = RunTrainer(
            run,
            reporting,
            model=policy,
            args=arguments(run, schedule),
            train_dataset=Dataset.from_dict({"rows": schedule.micro_batches}),
            data_collator=Collate(training.kept, vocabulary.padding, packed),
            processing_class=vocabulary.tokenizer,
            callbacks=[Padding(vocabulary, model), reporting],
            peft_config=new_adapter,
        )
    # TRL's loss divides by the step's tokens itself, whatever the model's forward accepts.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    if run.config.training_version > 1:
        trainer.add_callback(IdleSteps())
    reporting.trainer = trainer
    return trainer


def arguments(run: FileRun[SftConfig], schedule: Plan) -> TrlConfig:
    """What the plan and the config mean in TRL's words."""
    config, steps = run.config, len(schedule.steps)
    return TrlConfig(
        **trl_arguments(run),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=schedule.parts // run.world_size,
        max_steps=steps,
        train_sampling_strategy="sequential",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        learning_rate=learning_rate(config),
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=round(steps * config.warmup_ratio),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def rate_multiplier(config: SftConfig) -> float:
    return 1.0 if config.learning_rate_multiplier == "auto" else config.learning_rate_multiplier


def learning_rate(config: SftConfig) -> float:
    """The highest rate, multiplied."""
    base = (ADAPTER_RATE if config.lora else FULL_RATE) if config.learning_rate == "auto" else config.learning_rate
    return base * rate_multiplier(config)


def train_from_last(run: FileRun[SftConfig], trainer: RunTrainer, total: int) -> int:
    """Train from the newest checkpoint to the end; nothing is left to do if that is the last step's. Returns how many
    steps were made in all."""
    last = run.last_checkpoint()
    if last:
        trainer.reporting.resume(last)
    ends = trainer.reporting.selection.ends(run.config.early_stopping_patience)
    if last and (last.step >= total or (ends and not last.resume_only)):
        return last.step
    if last:
        run.message(f"Resuming after step {last.step} of {total}", step=last.step)
    trainer.train(resume_from_checkpoint=str(last.dir) if last else None)
    return int(trainer.state.global_step)
