"""Sizes of the tiles of the Triton kernels: a table, files of tuned ones, and the candidates.

A file is JSON, one per product (`python -m kernels.tune` writes it), with the fields of `Tile`:
`{"device_kind": "...", "tiles": {"int_matmul/W4A8/large": [128, 128, 64, 8, 8, 3]}}`. Files in
`tiles/`, beside this module, and in the folder of the environment variable KERNELS_TILES are
read; the latter win.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

FILES = Path(__file__).parent / 'tiles'
# Part of the key of jit's caches.
_FORCED = jax.make_user_context(None)


class Tile(NamedTuple):
    """Part of the result that one program computes, and how.

    Attributes:
      BM: rows of the result.
      BN: outputs.
      BK: bytes of a weight's row per step.
      GROUP: row tiles that run side by side, to share weights in the cache.
      num_warps: warps per program.
      num_stages: steps in flight.
    """

    BM: int
    BN: int
    BK: int
    GROUP: int
    num_warps: int
    num_stages: int


# Not yet timed on a GPU: chosen from compiled code (tests/kernels/test_triton_tiles.py), which
# spills nothing, leaves shared memory for two programs on 8.6, 8.9 and 12.0 (99 KB), and needs at
# most 4 instructions per tensor core instruction in the main loop of the large tile.
_EVERYWHERE = {
    'large': Tile(128, 128, 64, 8, 8, 3),
    'medium': Tile(64, 64, 128, 8, 4, 3),
    'few_rows': Tile(32, 64, 128, 8, 4, 3),
    'few_outputs': Tile(128, 32, 64, 8, 4, 3),
}
TABLE = {
    (capability, mode): _EVERYWHERE
    for capability in (80, 86, 89, 90, 120)
    for mode in ('W8A8', 'W4A8', 'W4A4')
}


def size_class(M: int, N: int) -> str:
    """Key of the table for a result of M rows and N outputs."""
    if N <= 32:
        return 'few_outputs'
    if M <= 32:
        return 'few_rows'
    # Fewer tiles of 128 x 128 than that leave processors of every listed GPU idle.
    return 'large' if -(-M // 128) * -(-N // 128) >= 96 else 'medium'


@functools.cache
def tuned(device_kind: str, folder: str | None) -> dict[str, Tile]:
    """Tiles from files for a product, by 'op/mode/size class'; empty if there are none."""
    tiles = {}
    folders = [FILES, Path(folder)] if folder else [FILES]
    for path in (path for each in folders for path in sorted(each.glob('*.json'))):
        content = json.loads(path.read_text(encoding='utf-8'))
        if content['device_kind'] == device_kind:
            tiles.update({key: Tile(*fields) for key, fields in content['tiles'].items()})
    return tiles


def lookup(
    op: str, mode: str, M: int, N: int, row_bytes: int, *, capability: int, device_kind: str
) -> Tile:
    """The tile for a result of M rows and N outputs.

    Args:
      op: 'int_matmul' or 'int_conv'.
      mode: 'W8A8', 'W4A8' or 'W4A4'.
      M: rows.
      N: outputs.
      row_bytes: bytes of a row of w, or of one tap; a step is no longer than that needs.
      capability: 86 for 8.6; unlisted ones use the nearest listed one below.
      device_kind: product, for tuned tiles.
    """
    if _FORCED.value is not None:
        return _FORCED.value
    name = size_class(M, N)
    tiles = tuned(device_kind, os.environ.get('KERNELS_TILES'))
    if f'{op}/{mode}/{name}' in tiles:
        return tiles[f'{op}/{mode}/{name}']
    known = max(listed for listed, _ in TABLE if listed <= max(capability, 80))
    tile = TABLE[known, mode][name]
    # 32 bytes are one instruction on 8 bits.
    return tile._replace(BK=min(tile.BK, max(32, 1 << (row_bytes - 1).bit_length())))


@contextlib.contextmanager
def using(tile: Tile) -> Iterator[None]:
    """Inside, every kernel that is traced uses this tile."""
    with _FORCED(tile):
        yield


# What tuning tries.
CANDIDATES = (
    *_EVERYWHERE.values(),
    Tile(128, 64, 64, 8, 4, 3),
    Tile(64, 128, 64, 8, 4, 3),
    Tile(128, 128, 32, 8, 8, 4),
    Tile(256, 64, 64, 8, 8, 3),
)
