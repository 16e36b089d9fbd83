"""The device that MLX computes on, and the libraries and compilers that it needs."""
