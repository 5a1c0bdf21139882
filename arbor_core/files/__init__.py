"""Uploaded files: bytes on the disk and rows in the database, never one without the other."""
