"""Moves jobs from where they are towards what was asked: validate, plan, claim, start, monitor, settle."""
