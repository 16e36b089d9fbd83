"""Versions: which ones are in memory, and which one serves."""
