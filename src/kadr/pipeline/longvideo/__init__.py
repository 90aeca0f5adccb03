"""Long videos: sampled window by window, resumable after an interruption."""
