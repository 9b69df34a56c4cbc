"""Which tensor gets which spec: ordered rules over layer paths, first match wins.

A layer whose input is two tensors, one after the other along the channels, may be quantized as two:
each half of the input and of the kernel by itself. The path of a half is that of the layer followed
by `inputs_BEGIN_END`, the channels it sees; wherever a layer has an entry by path, each half has.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dmq_jax.quant.tensor import QuantSpec

INPUT_ROLES = {
    'dense': ('input',),
    'conv': ('input',),
    'tap': ('input',),
    'product': ('lhs', 'rhs'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizableLayer:
    """A layer that could be quantized, as found in a network.

    Attributes:
      kind: 'dense', 'conv', 'product' or 'tap'.
      weight_shape: shape of its kernel; None without one.
      joined: channels of the first of the two tensors that its input is joined of; None: of one.
    """

    kind: str
    weight_shape: tuple[int, ...] | None
    joined: int | None = None


class Part(NamedTuple):
    """The part of a layer that sees channels `begin` to `end` - 1 of its input."""

    layer: str
    begin: int
    end: int

    @property
    def name(self) -> str:
        """The last step of its path."""
        return f'inputs_{self.begin}_{self.end}'

    @property
    def path(self) -> str:
        """Its path."""
        return f'{self.layer}/{self.name}' if self.layer else self.name


def part_at(path: str) -> Part | None:
    """The part of a layer that `path` names; None: it names a whole layer."""
    match = re.fullmatch(r'(?:(.*)/)?inputs_(\d+)_(\d+)', path)
    return None if match is None else Part(match[1] or '', int(match[2]), int(match[3]))


def layer_at(path: str) -> str:
    """The path of the layer that `path` names, whole or in part."""
    part = part_at(path)
    return path if part is None else part.layer


def parts_by_layer(paths: Iterable[str]) -> dict[str, tuple[Part, ...]]:
    """The parts among `paths`, in order of their channels, by the path of their layer."""
    found: dict[str, list[Part]] = {}
    for part in filter(None, map(part_at, paths)):
        found.setdefault(part.layer, []).append(part)
    return {layer: tuple(sorted(parts)) for layer, parts in found.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """How one layer is quantized.

    Attributes:
      weight: its kernel; None leaves it float, or there is none.
      inputs: its activations (of a product, both operands); None leaves them float.
      per_timestep: one activation scale per timestep, or one for all.
      trainable: whether methods may tune it (papers leave their 8-bit layers alone).
      lhs: of a product, its first operand where that has a grid of its own, as a softmax may.
    """

    weight: QuantSpec | None
    inputs: QuantSpec | None
    per_timestep: bool = True
    trainable: bool = True
    lhs: QuantSpec | None = None

    def activation(self, role: str) -> QuantSpec | None:
        """The spec of the input in this `role`, one of `INPUT_ROLES`; None: it stays float."""
        return self.lhs if role == 'lhs' and self.lhs is not None else self.inputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """The spec of every layer whose whole path matches `pattern`.

    Attributes:
      pattern: regular expression.
      spec: None leaves the layer float.
      optional: a preset's rule that may match nothing; one a user wrote may not.
    """

    pattern: str
    spec: LayerSpec | None
    optional: bool = False


Plan = Mapping[str, LayerSpec]


def make_plan(
    layers: Mapping[str, QuantizableLayer], rules: Sequence[Rule]
) -> dict[str, LayerSpec]:
    """The spec of every quantized layer; layers left float are absent.

    Args:
      layers: every quantizable layer of the network, by path.
      rules: tried in order.

    Raises:
      ValueError: a layer that no rule matches, or a rule that matches no layer first.
    """
    used: set[int] = set()
    plan = {}
    for path, layer in layers.items():
        index = next((i for i, r in enumerate(rules) if re.fullmatch(r.pattern, path)), None)
        if index is None:
            raise ValueError(f"No rule matches layer {path!r}; end the list with pattern '.*'.")
        used.add(index)
        spec = rules[index].spec
        if spec is not None:
            if layer.weight_shape is None:
                spec = dataclasses.replace(spec, weight=None)
            if spec.weight is not None or spec.inputs is not None:
                plan[path] = spec
    unused = [r.pattern for i, r in enumerate(rules) if i not in used and not r.optional]
    if unused:
        raise ValueError(f'Rules that match no layer: {unused}. Layers: {sorted(layers)[:5]}, ...')
    if not plan:
        raise ValueError('The rules leave every layer in floating point; nothing to quantize.')
    return plan


def split_joined(plan: Plan, layers: Mapping[str, QuantizableLayer]) -> dict[str, LayerSpec]:
    """`plan` with every layer of a joined input in two parts (Q-Diffusion, arXiv:2302.04304).

    Args:
      plan: of whole layers.
      layers: every quantizable layer; says where inputs are joined.
    """
    result = {}
    for path, spec in plan.items():
        parts = _halves(path, layers[path])
        result |= dict.fromkeys([part.path for part in parts] or [path], spec)
    return result


def split_layers(
    layers: Mapping[str, QuantizableLayer], plan: Iterable[str]
) -> dict[str, QuantizableLayer]:
    """`layers` with those that `plan` has in parts replaced by their parts."""
    result, parts = {}, parts_by_layer(plan)
    for path, layer in layers.items():
        if path not in parts:
            result[path] = layer
        for part in parts.get(path, ()):
            *taps, _, outputs = layer.weight_shape
            shape = (*taps, part.end - part.begin, outputs)
            result[part.path] = QuantizableLayer(kind=layer.kind, weight_shape=shape)
    return result


def multiplies_integers(plan: Plan) -> bool:
    """Whether a layer has integers on both sides, so that its product may be one of integers."""
    return any(spec.weight is not None and spec.inputs is not None for spec in plan.values())


def is_softmax(path: str, role: str) -> bool:
    """Whether the input in this `role` is what attention multiplies the values by."""
    return role == 'lhs' and path.rpartition('/')[2] == 'mix'


def _halves(path: str, layer: QuantizableLayer) -> list[Part]:
    if layer.joined is None:
        return []
    return [
        Part(path, 0, layer.joined),
        Part(path, layer.joined, layer.weight_shape[-2]),
    ]


def paper_rules(target: LayerSpec, edge: LayerSpec, exempt: Sequence[str] = ()) -> list[Rule]:
    """EfficientDM's coverage, as its code quantizes (arXiv:2310.03270).

    Embeddings of the timestep (and of sizes, which are added to them), first and last layer stay at
    8 bits with one scale for all timesteps and are not tuned; 1x1 shortcuts, strided convolutions
    and the attention products stay float. A transformer's first and last layers are those that
    fold and unfold its patches.

    Args:
      target: of all other layers.
      edge: of the layers at 8 bits.
      exempt: patterns of further layers that stay float.
    """
    embeddings = r'(time|added|resolution|ratio)_embed/.*|embed(_\d+)?/time/.*'
    return [
        *(Rule(pattern=pattern, spec=None, optional=True) for pattern in exempt),
        Rule(pattern=f'{embeddings}|conv_in|conv_out|patches/proj|out', spec=edge, optional=True),
        Rule(pattern='.*(conv_shortcut|downsample)', spec=None, optional=True),
        Rule(pattern='.*/(scores|mix)', spec=None, optional=True),
        Rule(pattern='.*', spec=target, optional=True),
    ]


def full_rules(target: LayerSpec) -> list[Rule]:
    """Every Dense, Conv and attention product at the target width; nothing is exempt."""
    return [Rule(pattern='.*', spec=target, optional=True)]
