"""The request: as it is asked, and resolved with nothing left open."""
