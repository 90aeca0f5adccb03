"""How a weight may be stored."""
