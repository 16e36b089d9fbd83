"""Jobs: requests, specifications, records, the queue, and the worker. Nothing here loads MLX."""
