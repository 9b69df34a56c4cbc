"""Files that ship with the package, found by name; README.md here says how they were made."""

import os
from pathlib import Path

_FOLDER = Path(__file__).parent


def find(name: str | os.PathLike, suffix: str) -> Path:
    """The bundled file `{name}_{suffix}`, or `name` as the path of a file of the user's.

    Args:
      name: of a data set, such as 'fashion_mnist', or any path.
      suffix: what the file is: 'teacher.safetensors', 'reference.npz', ...
    """
    bundled = _FOLDER / f'{name}_{suffix}'
    return bundled if bundled.is_file() else Path(name)


def names(suffix: str) -> list[str]:
    """The names of which `find` knows a bundled file."""
    return sorted(file.name.removesuffix(f'_{suffix}') for file in _FOLDER.glob(f'*_{suffix}'))
