"""Processes of this machine: how they start, wake one another and end, and what they may run short of."""
