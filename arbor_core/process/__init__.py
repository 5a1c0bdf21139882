"""Processes of this machine: how they start, speak, end, and what they may run short of."""
