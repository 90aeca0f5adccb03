"""Schedules, conditioning, guidance and samplers, on tensors and a model callable: no network, no file."""
