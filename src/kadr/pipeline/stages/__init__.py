"""The stages of a generation, in the order they run."""
