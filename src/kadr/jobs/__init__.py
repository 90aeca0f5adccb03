"""A durable queue of requests, and the workers that make their videos. Knows nothing of HTTP."""
