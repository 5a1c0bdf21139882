"""The engine's OpenAI-shaped face."""
