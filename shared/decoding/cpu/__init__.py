"""Prompts and decoding on a CPU, in C++ of our own."""
