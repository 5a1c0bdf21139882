"""The GRPO trainer: from groups to optimizer steps."""
