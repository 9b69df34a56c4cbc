"""Checkpoints of other projects as float denoisers: what a file is, and what is made of it."""
