"""Readers of foreign files into arrays: they know no network."""
