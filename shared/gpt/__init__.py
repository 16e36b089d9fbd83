"""The MLX model package: configuration, model, cache, sampling, weights, tokenizer."""
