"""Strict JAX, and eight CPU devices, for every test."""

import os

# Read once, when JAX starts its back end: must come before the first import of jax.
_DEVICES = '--xla_force_host_platform_device_count=8'
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'.strip()

import jax  # noqa: E402

# Silent widening of a dtype or of a rank is how wrong shapes pass unnoticed.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
