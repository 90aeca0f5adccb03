"""Words on their way to the text encoder: token ids, and what is done to a prompt before."""
