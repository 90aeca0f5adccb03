"""Encoders of output files, one for each kind of format; `media.writer` names the file and keeps half of one away."""
