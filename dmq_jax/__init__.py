"""Low-bit quantization and fine-tuning of diffusion models in JAX.

`load_teacher`, `quantize`, `sample`, `export` and `load` are the whole pipeline for notebooks; see
`dmq_jax.api`. They are imported on first use, so that `import dmq_jax` stays light.
"""

import importlib
from typing import Any

_API = ('Denoiser', 'Exported', 'export', 'load', 'load_teacher', 'quantize', 'sample')
__all__ = list(_API)
__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module('dmq_jax.api'), name)
