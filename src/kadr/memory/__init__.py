"""Where weights live, and for how long."""
