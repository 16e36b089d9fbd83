"""The device that MLX computes on, with the libraries and compilers that it needs."""
