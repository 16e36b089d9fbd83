"""Teachers: what a model learns from versions of the registry and from a large model."""
