"""Decides which versions are in memory and which one serves."""
