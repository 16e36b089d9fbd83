"""What the trainer and the inference service must agree on, and nothing else."""
