"""A call of a pipeline: its arguments, prompts, timesteps, noise and callback, and how it runs."""
