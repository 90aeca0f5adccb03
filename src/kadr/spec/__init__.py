"""Which components a model has: from headers and the registry, never a weight."""
