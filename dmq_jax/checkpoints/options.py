"""What a user may say of a checkpoint beside its path."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dmq_jax.models.torch_weights import PartialPut, Put, put_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a checkpoint is read.

    Attributes:
      num_classes: of a class table, of which row `num_classes` is then the null class.
      settings: a published name or a JSON file; see `read_settings`.
      components: a diffusers folder that holds what the checkpoint lacks.
      ema: the moving average (True) or the weights (False); None as the original's samplers do.
      dtype: of the denoiser's parameters, 'float32' or 'bfloat16'.
      prompts: what a text-conditional network is asked for, one label each; None: nothing, in
        one empty prompt.
      low_res: an `.npz` of the small images that an upsampler enlarges, and their classes.
      negative_prompt: the null condition of guidance; None: the empty text.
      shapes_only: parameters become `jax.ShapeDtypeStruct`: every tensor is checked, none is kept,
        and no text encoder runs.
      put: called with path and array of every weight of the network; the array, where it is to
        stay, takes its place. One that spreads weights is a `PartialPut`, and no more of a file is
        read than it keeps. None: the default device.
    """

    num_classes: int | None = None
    settings: str | None = None
    components: str | None = None
    ema: bool | None = None
    dtype: str = 'float32'
    prompts: Sequence[str] | None = None
    low_res: str | None = None
    negative_prompt: str | None = None
    shapes_only: bool = False
    put: Put | PartialPut | None = None

    def reading(self) -> dict[str, Any]:
        """The arguments of `torch_weights.read_params`: each tensor goes where it will stay."""
        put = _shape if self.shapes_only else self.put or place
        return {'dtype': jnp.dtype(self.dtype), 'put': put}

    def params(self, arrays: Iterable[tuple[str, np.ndarray]]) -> PyTree:
        """Parameters from arrays by path, which may be views of a file; each where it will stay."""
        return put_params(arrays, **self.reading())


def _shape(path: str, array: np.ndarray) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def place(path: str, array: np.ndarray) -> jax.Array:
    """`array` on the default device, before the next one is read; it must not be changed after."""
    return jax.block_until_ready(jax.device_put(array, may_alias=True))


def read_settings(
    options: Options, published: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, dict[str, Any] | None, dict[str, Any]]:
    """What `teacher.settings` says: a published name, settings of the network, of the process.

    A JSON file holds `{"network": {...}, "process": {...}}`, either of which may be missing: the
    first in the words of the original code (flags of guided diffusion, `unet_config.params` of
    latent diffusion), the second in those of diffusers' `scheduler_config.json`, and `image_size`.

    Args:
      options: of which `settings`.
      published: settings of networks by name.

    Raises:
      FileNotFoundError: neither a published name nor a file.
      ValueError: a file that is no such JSON.
    """
    name = options.settings
    if name is None:
        return None, None, {}
    if name in published:
        return name, dict(published[name]), {}
    file = Path(name)
    if not file.is_file():
        raise FileNotFoundError(
            f'teacher.settings={name!r}: neither a JSON file nor a published name; those of this '
            f'kind are {", ".join(published) or "none"}.'
        )
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{file}: not a JSON file ({error}).') from error
    known = {'network', 'process'}
    if not isinstance(content, dict) or not content.keys() <= known:
        raise ValueError(f'{file}: expected {{"network": {{...}}, "process": {{...}}}}.')
    return None, content.get('network'), dict(content.get('process', {}))


def unknown_settings(
    path: Path, what: str, *, example: Mapping[str, Any] | None = None
) -> ValueError:
    """The error for a checkpoint that does not tell what its network needs.

    Args:
      path: of the checkpoint.
      what: it does not tell.
      example: content of such a JSON file.
    """
    words = '' if example is None else f', such as {json.dumps(example)} with its own values'
    return ValueError(
        f'{path}: {what}; give teacher.settings, a JSON file '
        f'{{"network": {{...}}, "process": {{...}}}}{words}, or a published name.'
    )
