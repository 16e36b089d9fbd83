"""Trains models from a queue of jobs and publishes versions to the registry."""
