"""Backups: everything that cannot be made again, as one file, and its restoration."""
