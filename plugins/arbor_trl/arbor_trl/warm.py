"""Proof that a warm process can train: run once in a test fork, before any job's worker is forked."""

from __future__ import annotations

import torch
from torch import nn


def prove() -> None:
    """Forward, backward and one optimizer step of a small network, on a GPU where there is one.

    Raises:
        RuntimeError: the gradient or the loss is not a number; or whatever the libraries raise.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    loss = nn.functional.cross_entropy(network(torch.ones(32, 64, device=device)), torch.arange(32, device=device) % 8)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in network.parameters()]
    optimizer.step()
    if not torch.isfinite(loss) or any(g is None or not torch.isfinite(g).all() for g in gradients):
        raise RuntimeError(f"a test step on {device} gave the loss {loss.item()} or a gradient that is not a number")
