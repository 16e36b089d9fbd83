"""Tries a small grid of training values, and stops what falls behind early."""
