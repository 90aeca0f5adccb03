"""Diagnosis of this machine and of a request: why a video looks bad, or takes long, and what corrects it."""
