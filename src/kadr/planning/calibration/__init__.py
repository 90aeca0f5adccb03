"""The speed of this machine: measured once, stored on disk, and read by every plan."""
