"""What is asked for: a request, and the request with nothing left open."""
