"""Seconds of each stage, from its work and the calibration of the machine."""
