"""Images and videos in, videos out: what kadr does to pixels before the model sees them and after it has made them."""
