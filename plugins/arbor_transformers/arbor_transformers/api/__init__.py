"""The engine's HTTP API, in OpenAI's shapes."""
