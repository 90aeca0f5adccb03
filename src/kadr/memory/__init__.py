"""Modules in memory: devices, the module cache, block swapping."""
