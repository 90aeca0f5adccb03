"""Files to tensors to modules."""
