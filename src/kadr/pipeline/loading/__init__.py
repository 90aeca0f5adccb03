"""Loading: weights from files to modules, quantized, prepacked and placed."""
