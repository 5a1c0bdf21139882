"""The inside of a job: the process that trains, its parent, and what forks them."""
