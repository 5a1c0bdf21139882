"""The mock engine: completions without a model."""
