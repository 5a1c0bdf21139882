"""The policy as files that an engine loads: a PEFT adapter, or a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from arbor_trl.model import write_end_tokens
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from arbor_core import RolloutRun
from arbor_grpo import GrpoConfig

from .trainer import GroupTrainer


class Publisher:
    """Writes versions of the policy. What is the same in all of them, configuration and tokenizer, is written once."""

    def __init__(self, run: RolloutRun[GrpoConfig], trainer: GroupTrainer, tokenizer: Any) -> None:
        self.run, self.trainer = run, trainer
        self.bytes = 0
        """Of the files that were written last."""
        self.same = run.work / "published"
        if run.rank:
            return
        self.same.mkdir()
        model = trainer.accelerator.unwrap_model(trainer.model)
        if run.config.lora:
            model.peft_config["default"].save_pretrained(self.same)
            write_end_tokens(model, self.same)
        else:
            tokenizer.save_pretrained(self.same)

    @property
    def module(self) -> Any:
        """The model, or this rank's part of it."""
        return self.trainer.model_wrapped

    def publish(self, version: int, handled: int) -> int:
        """Send the present weights to engines; how many bytes of files they are. All ranks call it."""
        self.bytes = 0
        self.run.send_policy(version, handled, self)
        return self.bytes

    def write(self, folder: Path | None) -> None:
        """Write the present weights. All ranks call it: weights may be spread over them."""
        trainer = self.trainer
        state = None
        if self.run.world_size > 1:
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if folder is None:
            return
        shutil.copytree(self.same, folder, dirs_exist_ok=True)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self.run.config.lora:
            weights = get_peft_model_state_dict(model, state, adapter_name="default", save_embedding_layers=False)
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
                folder / "adapter_model.safetensors",
                metadata={"format": "pt"},
            )
        else:
            model.save_pretrained(folder, state_dict=state)
        self.bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
