"""Mixtures of experts: the loss that spreads tokens over them is that of the step, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_jobs import FULL, TWO_LAYERS, Job, floats, rollout, step, write_model
from grpo_jobs import group as ragged
from grpo_reference import reference, token_logps, tokens
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from arbor_core.types import Group

LOSSES = ("grpo", "bnpo", "dapo", "cispo", "vespo")
COEFFICIENT = 0.1
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of four experts."""
    path = tmp_path_factory.mktemp("models") / "experts"
    keys = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": COEFFICIENT}
    return write_model(path, MixtralConfig, MixtralForCausalLM, **TWO_LAYERS, **keys)


@pytest.fixture
def job(experts: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(name: str, **hyperparameters: Any) -> Job:
        return Job(tmp_path / name, "grpo", [], str(experts), {**FULL, "dtype": "float32", **hyperparameters})

    return make


def sampled(base: Any, *groups: Group) -> tuple[Group, ...]:
    """The groups as if the model had sampled them."""
    for group in groups:
        for said in group.rollouts:
            if said.completion:
                with torch.no_grad():
                    logps = token_logps(base, tokens(said.prompt), tokens(said.completion), 1.0)
                said.logprobs = floats(logps.tolist())
    return groups


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_row_counts_as_much(job, experts, loss_type):
    base = AutoModelForCausalLM.from_pretrained(experts)
    groups = sampled(base, ragged(1), ragged(2, size=3))
    made = job("rows", groups_per_step=2, micro_batch_size=1, loss_type=loss_type)
    made.send(*groups)
    trainer = made.composed()
    loss, gradients = step(trainer)
    trainer.policy.zero_grad()
    sequences = [tokens(said.prompt + said.completion) for each in groups for said in each.rollouts if said.completion]
    place = trainer.policy.device
    spreads = [trainer.policy(input_ids=ids[None].to(place), output_router_logits=True).aux_loss for ids in sequences]
    spread = torch.stack(spreads).mean().cpu()
    expected = reference(trainer.policy, base, groups, trainer.run.config) + COEFFICIENT * spread
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE)
    assert trainer._metrics["train"]["aux_loss"] == [pytest.approx(spread.item(), abs=TOLERANCE)]
    for name, parameter in trainer.policy.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=TOLERANCE), name


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_cut_does_not_matter(job, loss_type):
    """Rows of the same tokens: each micro-batch spreads them as the whole step does."""
    same = [rollout(n, [97, 98], [99, 100, 101], float(n)) for n in range(4)]
    found = []
    for most in (4, 3, 1):
        made = job(f"at_most_{most}", micro_batch_size=most, loss_type=loss_type)
        made.send(Group(rollouts=tuple(same), version=0))
        trainer = made.composed()
        found.append((len(trainer.parts), *step(trainer)))
        assert len(trainer.parts) == -(-4 // most)
    (_, loss, gradients), *others = found
    for _, other, of_other in others:
        assert other == pytest.approx(loss, abs=TOLERANCE)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, of_other[name], atol=TOLERANCE), name
