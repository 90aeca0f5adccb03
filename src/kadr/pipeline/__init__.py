"""A generation: from a request to a finished video."""
