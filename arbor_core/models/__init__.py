"""Which models there are: bases, results and checkpoints of jobs, policies."""
