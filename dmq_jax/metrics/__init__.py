"""Measures of image sets: distances on features, neighbours, pixel similarity, feature networks.

Distances and neighbours work on feature arrays [N, D] and do not care which network made them.
"""
