"""A training run: corpus, tokens, batches, loss, optimizer, loop, evaluation."""
