"""What a request does, without HTTP: the composition root, jobs that are created and asked, what plugins may use."""
