"""Benchmarks of kadr on this machine: cases, contenders that run in turns, and the figures they give."""
