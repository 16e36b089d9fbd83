"""A training run: configuration, batches, loss, optimizer, loop, evaluation."""
