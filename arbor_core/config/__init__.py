"""Configuration: YAML composed by Hydra, structs that type it, keys of the API."""
