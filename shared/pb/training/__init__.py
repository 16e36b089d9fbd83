"""Generated from proto/training."""
