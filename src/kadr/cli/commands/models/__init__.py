"""`kadr models` and what is below it."""
