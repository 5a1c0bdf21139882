"""Supervised fine-tuning: names and types only. The work is in `train`, which the server never imports."""
