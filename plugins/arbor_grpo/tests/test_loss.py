"""Loss and gradient against a plain reference: each row alone, nothing padded, cut or shared."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from arbor_grpo.training.trainer import GroupTrainer
from arbor_sft.tiny import tokenizer
from grpo_jobs import FULL, Job, floats, group, rollout, step
from grpo_reference import reference, token_logps, tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from arbor_core.types import Group, Rollout

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
GROUPS = (group(1), group(2, size=3), group(3, size=2), group(4, size=5))
LENGTH = 16
TEMPERATURE = 0.8
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def sampled(tiny: Path) -> tuple[Group, ...]:
    """The groups as if the base model, or one near it, had sampled them."""
    return near_samples(tiny)


def near_samples(path: Path) -> tuple[Group, ...]:
    base = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(2)

    def near(said: Rollout) -> Rollout:
        if not said.completion:
            return said
        with torch.no_grad():
            logps = token_logps(base, tokens(said.prompt), tokens(said.completion), TEMPERATURE)
        noise = 0.2 * torch.randn_like(logps)
        return msgspec.structs.replace(said, logprobs=floats((logps + noise).clamp(max=0).tolist()))

    return tuple(msgspec.structs.replace(g, rollouts=tuple(map(near, g.rollouts))) for g in GROUPS)


def perturbed(trainer: GroupTrainer) -> None:
    """Move the policy away from the reference, and an adapter away from its zeros, by the same on every device."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape).to(parameter.device) * 0.05)


def is_the_references(made: Job, sampled: tuple[Group, ...]) -> None:
    """Loss and gradient of a step on these groups, in ragged micro-batches."""
    made.send(*sampled)
    trainer = made.composed()
    perturbed(trainer)
    loss, gradients = step(trainer)
    assert len(trainer.parts) > 1
    assert trainer.shares == trainer.run.config.share_prompts
    trainer.policy.zero_grad()
    base = AutoModelForCausalLM.from_pretrained(made.model)
    expected = reference(trainer.policy, base, sampled, trainer.run.config)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=TOLERANCE, rel=TOLERANCE)
    largest = max(float(p.grad.abs().max()) for p in trainer.policy.parameters() if p.grad is not None)
    assert largest > 1e-3
    for name, parameter in trainer.policy.named_parameters():
        if parameter.grad is not None:
            assert float((gradients[name] - parameter.grad).abs().max()) < TOLERANCE * max(1.0, largest), name


RAGGED = {
    "groups_per_step": len(GROUPS),
    "micro_batch_size": 3,
    "max_completion_length": LENGTH,
    "temperature": TEMPERATURE,
}


@pytest.mark.parametrize(("loss_type", "level"), list(itertools.product(LOSSES, ("token", "sequence"))))
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["lora", "full"])
def test_the_loss_of_ragged_micro_batches_is_the_references(job, sampled, loss_type, level, beta, weights):
    more = FULL if weights == "full" else {}
    made = job(loss_type=loss_type, importance_sampling_level=level, beta=beta, **RAGGED, **more)
    is_the_references(made, sampled)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_row_83_truncated_completions_are_left_out_when_asked(job, sampled, loss_type):
    """Of the loss and of the tokens that it is divided by, but not of the rows."""
    assert any(said.truncated and said.completion for each in sampled for said in each.rollouts)
    is_the_references(job(loss_type=loss_type, beta=0.1, mask_truncated_completions=True, **RAGGED), sampled)


@pytest.mark.parametrize(
    "keys",
    [
        {"epsilon": 0.05},
        {"epsilon_high": 0.05},
        {"delta": 1.02},
        {"off_policy_mask_threshold": 0.01},
        {"loss_type": "cispo", "epsilon_high": 1.02},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0},
        {"loss_type": "sapo", "sapo_temperature_neg": 2.0},
        {"loss_type": "vespo", "vespo_k_pos": 1.0},
        {"loss_type": "vespo", "vespo_lambda_pos": 2.0},
        {"loss_type": "vespo", "vespo_k_neg": 1.0},
        {"loss_type": "vespo", "vespo_lambda_neg": 3.0},
        {"beta": 0.1, "use_bias_correction_kl": True},
    ],
    ids=lambda keys: "-".join(map(str, keys)),
)
def test_what_is_not_the_default_reaches_the_loss(job, sampled, keys):
    is_the_references(job(**RAGGED, **keys), sampled)


@pytest.mark.parametrize("bounds", [(0.5, 2.0), (None, 1.2), (0.2, None)], ids=["both", "max", "min"])
@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [
        *itertools.product(("token_truncate", "token_mask"), ("dapo", "vespo")),
        *itertools.product(("sequence_truncate", "sequence_mask"), ("dapo", "grpo")),
    ],
)
def test_importance_sampling_corrects_recomputed_ratios(job, sampled, mode, loss_type, bounds):
    low, high = bounds
    keys = {"importance_sampling_clip_min": low, "importance_sampling_clip_max": high, "loss_type": loss_type}
    is_the_references(job(ratio="recomputed", importance_sampling_mode=mode, **keys, **RAGGED), sampled)


@pytest.mark.parametrize("share", [True, False])
def test_learned_positions_count_from_the_beginning_of_a_prompt(tmp_path, share):
    words = tokenizer(256)
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    keys = {**RAGGED, **FULL, "dtype": "float32", "share_prompts": share, "beta": 0.1}
    made = Job(tmp_path / "job", "grpo", [], str(tmp_path / "model"), keys)
    is_the_references(made, near_samples(tmp_path / "model"))


@pytest.mark.parametrize(
    "way", [{}, {"micro_batch_size": 1}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, **FULL}]
)
def test_the_gradient_is_the_same_however_it_is_computed(job, way):
    found = []
    plain = {key: value for key, value in way.items() if key == "lora"}
    for name, more in (("plain", {"share_prompts": False, **plain}), ("other", way)):
        trainer = ready(job(name, groups_per_step=len(GROUPS), loss_type="grpo", **more))
        found.append(step(trainer))
        assert trainer.shares == (name == "other")
    assert found[0][0] == pytest.approx(found[1][0], abs=TOLERANCE)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=TOLERANCE), name


def ready(made: Job) -> GroupTrainer:
    """A trainer before its first step, which `train` would have told to checkpoint gradients."""
    made.send(*GROUPS)
    trainer = made.composed()
    if trainer.args.gradient_checkpointing:
        trainer.policy.gradient_checkpointing_enable()
    perturbed(trainer)
    return trainer


def test_layers_that_run_twice_drop_out_the_same_and_read_the_same_prompts(job):
    ran, found = [], []
    for name in (False, True):
        keys = {"groups_per_step": len(GROUPS), "lora": {"dropout": 0.3}, "micro_batch_size": 3}
        trainer = ready(job(str(name), gradient_checkpointing=name, **keys))
        (first,) = (module for path, module in trainer.policy.named_modules() if path.endswith("layers.0.self_attn"))
        times: list[int] = []
        first.register_forward_hook(lambda *_, times=times: times.append(1))
        torch.manual_seed(5)
        found.append(step(trainer))
        ran.append(len(times))
        assert trainer.shares
    assert ran[1] == ran[0] + 2 * len(trainer.parts)
    assert found[0][0] == pytest.approx(found[1][0], abs=TOLERANCE)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=TOLERANCE), name


def gradient(job: Any, name: str, *groups: Group, **hyperparameters: Any) -> torch.Tensor:
    """All of a step's gradient as one vector."""
    made = job(name, groups_per_step=len(groups), **hyperparameters)
    made.send(*groups)
    trainer = made.composed()
    perturbed(trainer)
    return torch.cat([g.flatten() for g in step(trainer)[1].values()])


def two(**more: Any) -> Group:
    """Two rollouts of three tokens each; the second has the environment's in its middle."""
    prompt = [97, 98, 99]
    return Group(
        rollouts=(
            rollout(0, prompt, [100, 101, 102], 1.0),
            rollout(1, prompt, [103, 104, 105], 0.0, mask=b"\1\0\1", **more),
        ),
        version=0,
    )


def test_the_samplers_log_probabilities_are_in_the_ratio(job):
    unclipped = {"epsilon": 100.0, "loss_type": "dapo"}
    before = gradient(job, "before", two(logprobs=floats([-3.0, 0.0, -3.0])), **unclipped)
    after = gradient(job, "after", two(logprobs=floats([-3.5, 0.0, -3.5])), **unclipped)
    assert float((before - after).abs().max()) > 1e-3


def test_recomputed_ratios_do_without_the_samplers(job):
    before = gradient(job, "before", two(logprobs=floats([-3.0, 0.0, -3.0])), ratio="recomputed")
    after = gradient(job, "after", two(logprobs=floats([-3.5, 0.0, -3.5])), ratio="recomputed")
    assert torch.equal(before, after)


def test_tokens_of_the_environment_are_not_in_the_loss(job):
    before = gradient(job, "before", two(logprobs=floats([-3.0, 0.0, -3.0])))
    after = gradient(job, "after", two(logprobs=floats([-3.0, -5.0, -3.0])))
    assert torch.equal(before, after)


def test_advantages_of_the_client_are_taken_as_they_are(job):
    said = Group(
        rollouts=tuple(
            rollout(n, [97, 98], [99, 100 + n], 0.5, advantage=advantage) for n, advantage in enumerate((2.0, -1.0))
        ),
        version=0,
    )
    made = job()
    made.send(said)
    trainer = made.composed()
    trainer.training_step(trainer.model, [])
    assert trainer.batch["advantages"].tolist() == [2.0, -1.0]


def test_a_step_without_anything_to_learn_is_a_step(job):
    """Equal rewards, and completions without a token."""
    made = job()
    made.send(Group(rollouts=tuple(rollout(n, [97, 98], [99] * n, 0.5) for n in range(2)), version=0))
    session = made.session()
    trainer = session.trainer
    loss, gradients = step(trainer)
    assert loss == 0
    assert not gradients, "nothing ran, and the optimizer moves nothing"
    assert session.measured["frac_reward_zero_std"] == 1
    assert not [values for values in trainer._metrics["train"].values() if values], "of nothing that ran"


def test_text_is_tokenised_as_an_engine_would(job):
    said = [{"role": "user", "content": "hi"}]
    made = job()
    made.send(
        Group(
            rollouts=tuple(
                Rollout(trajectory=n, reward=float(n), messages=said, answer={"role": "assistant", "content": text})
                for n, text in enumerate(("yes", "no"))
            ),
            version=0,
        )
    )
    trainer = made.composed()
    trainer.training_step(trainer.model, [])
    words = trainer.processing_class
    prompt = words.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    batch = trainer.batch
    assert words.decode(batch["prompt_ids"][0]) == prompt
    assert words.decode(batch["completion_ids"][0]) == "yes<|im_end|>"
    assert words.decode(batch["completion_ids"][1][:3]) == "no<|im_end|>"
    assert "old_per_token_logps" not in batch


def test_only_the_tokens_with_the_highest_entropies_of_the_whole_step_are_learned(job):
    made = job(groups_per_step=len(GROUPS), top_entropy_quantile=0.3, micro_batch_size=2)
    made.send(*GROUPS)
    trainer = made.composed()
    perturbed(trainer)
    step(trainer)
    learned = int(trainer.batch["entropy_mask"].sum())
    assert learned == pytest.approx(0.3 * trainer.tokens, abs=2)
