"""Quantization: weight formats, quantizers, and the layers that replace `Linear`."""
