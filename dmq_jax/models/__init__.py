"""Float networks in plain Flax: they know nothing of quantization."""
