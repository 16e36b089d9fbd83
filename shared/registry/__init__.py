"""Checkpoints on disk: states to resume from and versions to serve."""
