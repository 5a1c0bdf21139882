"""What arbor-grpo relies on in TRL and transformers: a release that changes it must be looked at before it is used."""

from __future__ import annotations

import inspect
from typing import get_args

import trl
from arbor_grpo import LossType
from arbor_grpo.training.trainer import GroupTrainer
from transformers import Trainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_this_is_the_release_that_was_looked_at():
    assert trl.__version__.startswith("1.16."), "read the other tests of this file, then move the pin"


def test_the_replaced_methods_have_the_signatures_that_they_had():
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(GRPOTrainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters(GRPOTrainer.get_high_entropy_mask) == ["self", "entropies", "mask", "threshold"]
    first = ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    rest = ["batch_size", "compute_entropy", "compute_aux_loss"]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:8] == [*first, *rest]
    assert parameters(Trainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"]
    assert parameters(GRPOTrainer._save_checkpoint) == ["self", "model", "trial"]
    assert parameters(GRPOTrainer._save) == ["self", "output_dir", "state_dict"]


def test_the_loss_reads_what_the_ready_batch_holds():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for key in (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "tool_mask",
        "advantages",
        "num_items_in_batch",
        "old_per_token_logps",
        "ref_per_token_logps",
        "sampling_per_token_logps",
        "importance_sampling_ratio",
    ):
        assert f'"{key}"' in source, key
    assert "self.use_vllm and self.vllm_importance_sampling_correction" in source


def test_every_loss_of_trl_can_be_chosen():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    for loss in get_args(LossType):
        assert f'"{loss}"' in source, loss
    described = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {word.strip("'`.,") for word in described.split() if word.startswith("'")}
    assert {word for word in named if word.isidentifier()} <= set(get_args(LossType))


def test_trl_has_the_attributes_that_are_used(job):
    trainer = job().composed()
    for name in (
        "aux_loss_enabled",
        "router_aux_loss_coef",
        "beta",
        "num_iterations",
        "loss_type",
        "importance_sampling_level",
        "top_entropy_quantile",
        "use_vllm",
        "ref_model",
        "_metrics",
        "_step",
        "_tokenizer",
    ):
        assert name in vars(trainer), name
    assert isinstance(trainer, GroupTrainer)
    assert trainer.use_vllm is False
