"""Python clients of the inference service. They import nothing of the server."""
