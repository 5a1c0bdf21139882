"""What requests do, without HTTP: the composition root, the service of jobs, and what plugins may use."""
