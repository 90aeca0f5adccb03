"""Measures what kadr costs in time and memory."""
