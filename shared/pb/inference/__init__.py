"""Generated from proto/inference."""
