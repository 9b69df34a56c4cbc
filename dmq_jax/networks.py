"""Networks of every family behind one call, `apply(variables, x, t, y)`, and as JSON values.

`y` is whatever a network is conditioned on besides noise and time, a pytree with a leading batch
axis: None, class labels, or a mapping of further inputs. A network that looks at a text, at the
embedding of a class or at a small image is wrapped in `Conditioned`: what it looks at stands in a
table among its parameters, one row for every class, prompt or image, so that its `y` is labels as
well. A row more than there are labels is the null condition of classifier-free guidance; after it
may come what is never drawn, the texts of images that are learnt from.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from dmq_jax.models.adm_unet import ADMUNet
from dmq_jax.models.autoencoder import AutoencoderKL, VQAutoencoder
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.models.dit import DiT, PixArt
from dmq_jax.models.ldm_unet import LDMUNet

# A network without an entry 'family' is the first one: all were, when there was no other.
FAMILIES: dict[str, type[nn.Module]] = {
    'ddpm': DDPMUNet,
    'adm': ADMUNet,
    'ldm': LDMUNet,
    'dit': DiT,
    'pixart': PixArt,
}
AUTOENCODERS: dict[str, type[nn.Module]] = {'kl': AutoencoderKL, 'vq': VQAutoencoder}
# The entry of `params` that holds the rows, and that of a mapping `y` that names one.
TABLE = 'conditions'
LABEL = 'label'
# An input of networks that make large images of small ones.
SMALL_IMAGES = 'low_res'


@dataclasses.dataclass(frozen=True)
class Conditioned:
    """A network whose further inputs come as one pytree.

    Attributes:
      network: takes `(x, t, **inputs)`.
      rows: the table `params['conditions']` in front of it, as (input, shape of a row); empty:
        there is none, and `y` names every input.
      num_rows: of the table, the null condition included.
    """

    network: nn.Module
    rows: tuple[tuple[str, tuple[int, ...]], ...] = ()
    num_rows: int = 0

    def apply(self, variables: PyTree, x: Array, t: Array, y: PyTree = None, **options: Any) -> Any:
        """As the network's.

        Args:
          variables: the network's, and the table among its `params`.
          x: noisy images.
          t: timesteps.
          y: labels, rows of the table; or a mapping of inputs, of which 'label' does the same.
          **options: of `flax.linen.Module.apply`.

        Raises:
          ValueError: labels of a network without a table.
        """
        inputs = dict(y) if isinstance(y, Mapping) else {} if y is None else {LABEL: y}
        label = inputs.pop(LABEL, None)
        if label is not None:
            if not self.rows:
                raise ValueError('y has labels, but this network has no table of conditions.')
            table = variables['params'][TABLE]
            inputs |= {name: table[name][label] for name, _ in self.rows}
        for name in inputs:
            # Tables are float32, as all parameters.
            if name.endswith('_mask') or name == 'y':
                inputs[name] = inputs[name].astype(jnp.int32)
        return self.network.apply(variables, x, t, **inputs, **options)

    def init(self, key: Array, x: Array, t: Array, y: PyTree = None) -> PyTree:
        """Random variables; the rows of the table are standard normal."""
        keys = jax.random.split(key, len(self.rows) + 1)
        table = {
            name: jax.random.normal(k, (self.num_rows, *shape))
            for k, (name, shape) in zip(keys[1:], self.rows, strict=True)
        }
        inputs = dict(y) if isinstance(y, Mapping) else {}
        label = inputs.pop(LABEL, jnp.zeros(x.shape[:1], jnp.int32))
        inputs |= {name: table[name][label] for name in table}
        if 'y' in table:
            inputs['y'] = label * 0
        variables = self.network.init(keys[0], x, t, **inputs)
        if not self.rows:
            return variables
        return {**variables, 'params': {**variables['params'], TABLE: table}}


Network = nn.Module | Conditioned


def unwrapped(network: Network) -> nn.Module:
    """The Flax module itself."""
    return network.network if isinstance(network, Conditioned) else network


def family(network: Network) -> str:
    """The name of its family."""
    module = unwrapped(network)
    known = {kind: name for name, kind in (FAMILIES | AUTOENCODERS).items()}
    assert type(module) in known, f'{type(module).__name__} is no family of FAMILIES'
    return known[type(module)]


def conditions(network: Network) -> tuple[str, ...]:
    """The inputs that stand in the table in front of a network; none without one."""
    return tuple(dict(network.rows)) if isinstance(network, Conditioned) else ()


def class_rows(network: Network) -> int:
    """Rows of the table of classes or prompts; 0 without one."""
    if isinstance(network, Conditioned):
        return network.num_rows
    if isinstance(network, DDPMUNet):
        return network.num_class_embeds or 0
    if isinstance(network, DiT):
        return network.num_classes + 1
    return getattr(network, 'num_classes', None) or 0


def to_settings(network: Network) -> dict[str, Any]:
    """What rebuilds `network`, as JSON values; the dtype is not among them."""
    module = unwrapped(network)
    settings = {
        field.name: getattr(module, field.name)
        for field in dataclasses.fields(module)
        if field.name not in ('parent', 'name', 'dtype')
    }
    if not isinstance(module, DDPMUNet):
        settings['family'] = family(module)
    if isinstance(network, Conditioned):
        settings[TABLE] = {'rows': network.rows, 'num_rows': network.num_rows}
    return settings


def from_settings(settings: Mapping[str, Any]) -> Network:
    """The network that `to_settings` described, possibly through JSON.

    Raises:
      ValueError: a family that is not known.
    """
    values = {name: _tuples(value) for name, value in settings.items()}
    kind = values.pop('family', 'ddpm')
    known = FAMILIES | AUTOENCODERS
    if kind not in known:
        raise ValueError(f'family={kind!r}: expected one of {", ".join(known)}.')
    table = values.pop(TABLE, None)
    module = known[kind](**values)
    return (
        module if table is None else Conditioned(module, _tuples(table['rows']), table['num_rows'])
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
