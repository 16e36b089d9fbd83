"""Training on a CPU: gradients and losses by a library of the project's own."""
