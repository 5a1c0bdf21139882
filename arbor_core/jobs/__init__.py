"""The tables of jobs and all that may be done to them."""
