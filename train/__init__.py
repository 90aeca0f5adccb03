"""How the demo model is made, from nothing: its world, its training, its export."""
