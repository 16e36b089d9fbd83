"""Tries a small grid of training values, and stops the worst candidates early."""
