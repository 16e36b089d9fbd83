"""Prompts and decoding on an NVIDIA GPU, with kernels of our own in CUDA graphs."""
