"""The components of a model, found from headers and the registry; no weight is read."""
