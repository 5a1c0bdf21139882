"""Training files and conversations: rows that are read and checked, and chat formats."""
