"""Generated from proto/training/v1."""
