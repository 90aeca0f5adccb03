"""Requests again: as a command line."""
