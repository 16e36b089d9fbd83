"""The gRPC API of the inference service."""
