"""Kernels for the CPU alone."""
