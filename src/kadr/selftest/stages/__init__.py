"""The stages of the self-test: each is a function of a `Subject` that yields checks."""
