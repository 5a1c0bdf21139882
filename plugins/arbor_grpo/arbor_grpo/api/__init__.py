"""GRPO's routes, and what they read and show."""
