"""Flags: their definition, and their translation to a request and the options of an engine."""
