"""From a request for a completion to its engine and back."""
