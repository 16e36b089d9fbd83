"""Runs the services' processes together: supervision, health, the demonstration."""
