"""The queue of jobs: requests, records, events, and the worker."""
