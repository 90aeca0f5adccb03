"""Routes of the API: from a request to a job of the queue, and from a job to an answer."""
