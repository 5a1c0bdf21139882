"""Engines: which process serves which model, and how policies get into it."""
