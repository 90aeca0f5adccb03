"""Kernels that run on CPUs only."""
