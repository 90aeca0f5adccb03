"""Flags, until they are a request and the options of an engine."""
