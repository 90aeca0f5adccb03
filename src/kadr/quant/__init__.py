"""Weight formats: quantized storage of the weights of finished modules."""
