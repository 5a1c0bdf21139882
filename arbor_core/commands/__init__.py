"""The server's side of jobs that execute commands."""
