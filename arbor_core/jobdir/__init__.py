"""The job directory, the protocol between server and worker: its paths, its documents, its logs."""
