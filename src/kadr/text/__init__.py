"""Text for the text encoder: prompt enhancement by a chat model, and the tokenizer."""
