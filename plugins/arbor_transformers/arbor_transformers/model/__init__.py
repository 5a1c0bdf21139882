"""The model: loaded, batched over slots, with adapters, with weights that change."""
