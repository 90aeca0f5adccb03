"""Output for a terminal: errors, progress, tables."""
