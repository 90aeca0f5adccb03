"""The request, and the request with every value resolved."""
