"""Names and shapes of the tensors of published checkpoints."""

import gzip
import json
from pathlib import Path


def listing(name: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the checkpoint listed in `fixtures/<name>.txt.gz`."""
    text = gzip.decompress((Path(__file__).parent / f'fixtures/{name}.txt.gz').read_bytes())
    rows = (line.split('\t') for line in text.decode().splitlines())
    return {name: tuple(json.loads(shape)) for name, shape in rows}


def name_map(name: str) -> dict[str, str]:
    """Names of the same tensors in two layouts, of `fixtures/<name>.json.gz`."""
    text = gzip.decompress((Path(__file__).parent / f'fixtures/{name}.json.gz').read_bytes())
    return json.loads(text)


def without_ones(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes without the axes by which a 1x1 convolution differs from a dense layer."""
    return {name: tuple(n for n in shape if n != 1) for name, shape in shapes.items()}
