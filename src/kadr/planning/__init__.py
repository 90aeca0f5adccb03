"""What a request will take: memory, time, and where each module lives. Arithmetic on headers."""
