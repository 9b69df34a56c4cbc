"""Named shapes of real products, shared by test and benchmark."""

from typing import NamedTuple


class Shape(NamedTuple):
    """`x [*batch, M, K]` times `w [*batch, N, K]`."""

    batch: tuple[int, ...]
    M: int
    N: int
    K: int


# Test-sized, among them one row, a K below one packed byte and ragged sizes.
SMALL = {
    'aligned': Shape((), 16, 8, 32),
    'ragged': Shape((), 7, 5, 13),
    'one_row': Shape((), 1, 3, 1),
    'odd_k_heads': Shape((2, 3), 5, 4, 9),
    'attention': Shape((2,), 16, 16, 8),
}

# Batch 8 of the CIFAR-10 U-Net (128-256 channels), and a DiT block.
REAL = {
    'time_embedding': Shape((), 16, 256, 512),
    'attention_projection_16x16': Shape((), 2048, 256, 256),
    'attention_scores_16x16': Shape((8,), 256, 256, 256),
    'attention_heads_16x16': Shape((8, 4), 256, 256, 64),
    'dit_mlp': Shape((), 2048, 1536, 384),
}
