"""Videos longer than one window: sampled window by window, resumable."""
