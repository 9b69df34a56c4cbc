"""Low-bit quantization and fine-tuning of diffusion models in JAX."""
