"""Plans a request before anything is loaded: memory, time and the placement of each module, from headers alone."""
