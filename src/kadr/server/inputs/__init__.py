"""Bodies and uploads that clients send, and the media that requests name."""
