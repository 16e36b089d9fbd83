"""Generated from proto/inference/v1."""
