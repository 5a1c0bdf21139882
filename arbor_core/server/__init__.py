"""The HTTP server: one file per resource of the API."""
