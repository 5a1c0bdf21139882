"""Prompts that each named checkpoint of a job answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arbor_trl.probes import answered
from grpo_jobs import QUICK, Background, Job, groups
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import until

from arbor_core.jobdir.samples import SampledGroup, newest_first
from arbor_core.types import MetricsEvent

PROBES = ["one", "and then?"]


def kept(job: Job) -> list[SampledGroup]:
    """The answers to probes that are among the job's samples, oldest first."""
    groups = {group.step or 0: group for _, group in newest_first(job.files.samples) if "probe:" in str(group.label)}
    return [group for _, group in sorted(groups.items())]


def test_each_named_checkpoint_answers_the_probes(job: Any, tiny: Path) -> None:
    """With what its files answer, before the first step, between steps, and at the end; training is as without them."""
    keys = {**QUICK, "learning_rate": 3e-2, "resume_seconds": None}
    made, plain = job("made", probes=PROBES, **keys), job("plain", max_steps=3, **keys)
    plain.send(*groups(6))
    plain.must()
    attempt = Background(made)
    made.request_checkpoint("before")
    until(lambda: len(kept(made)) == 1, 120)
    made.send(*groups(4))
    attempt.until(MetricsEvent, 2)
    made.request_checkpoint("between")
    until(lambda: len(kept(made)) == 2, 120)
    made.send(*groups(2, start=4))
    attempt.until(MetricsEvent, 3)
    made.ask("finish")
    assert attempt.end() == 0
    found = kept(made)
    assert [(group.label, group.step) for group in found] == [
        ("probe:before", 0),
        ("probe:between", 2),
        ("probe:result", 3),
    ]
    assert made.digests() == plain.digests()
    texts = [[rollout.completion for rollout in group.rollouts] for group in found]
    assert texts == [said_by(tiny, made.files.checkpoints / f"{step}-1", made) for step in (0, 2, 3)]
    assert texts[0] != texts[1] != texts[2], "the case shows nothing"
    assert all(list(group.prompts) == PROBES for group in found)


def said_by(base: Path, checkpoint: Path, job: Job) -> list[str]:
    """What the files of a checkpoint answer."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(checkpoint)).eval()
    return [answered(job.open(), model, tokenizer, prompt) for prompt in PROBES]
