"""Integer products and convolutions on bare arrays; imports nothing from `dmq_jax`."""
