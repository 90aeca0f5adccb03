"""Images and clips: reading, and preprocessing for the model; videos: postprocessing and writing."""
