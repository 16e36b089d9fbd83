"""The commands of the trainer service."""
