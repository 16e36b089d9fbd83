"""Serves the best version of the registry over gRPC and hot-loads the next."""
