"""Arithmetic of quantization: it knows no network and no paper."""
