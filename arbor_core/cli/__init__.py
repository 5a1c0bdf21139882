"""The commands `arbor-serve` and `arbor`."""
