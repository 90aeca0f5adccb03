"""Several videos with one engine, one after another."""
