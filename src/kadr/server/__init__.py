"""HTTP over the job queue: the OpenAI Videos API, with all that a request can say, events, plans and health."""
