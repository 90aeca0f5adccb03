"""Batches: the rows of a file as videos in a folder, each made once, on a queue of its own in that folder."""
