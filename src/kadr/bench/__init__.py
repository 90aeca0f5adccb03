"""Benchmarks of kadr on this machine: cases, contenders that run alternately, and their results."""
