"""The parts of a network that learn one after another, and their parts of plans and states.

Blocks are modules of the network, found by path; a quantized layer outside of them is a block by
itself. Layers all over the network that learn first (`methods.base.JointBlock`) are one as well.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from dmq_jax import denoisers
from dmq_jax.methods.base import JointBlock, Phase
from dmq_jax.quant.layers import recorded_calls
from dmq_jax.quant.plan import LayerSpec, Plan, layer_at


class Block(NamedTuple):
    """A part of the network that learns as one.

    Attributes:
      path: of its module; '' is the network itself.
      layers: paths of the quantized layers in it that learn with it.
      fixed: paths of those that have learnt before, with a joint block.
      outputs: of a joint block (`methods.base.JointBlock`), the layers whose outputs are compared;
        (): the module's own.
    """

    path: str
    layers: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people."""
        return self.path or 'joint block'


def find_blocks(
    teacher: denoisers.Denoiser, plan: Plan, pattern: str, joint: JointBlock | None = None
) -> list[Block]:
    """The blocks that hold the layers of `plan`: a joint one, then in the order of execution.

    Args:
      teacher: the float network.
      plan: what is quantized.
      pattern: regular expression over module paths; outermost matches are blocks.
      joint: layers that learn before all others; those that are not trainable do not.

    Raises:
      ValueError: the pattern matches no module.
    """

    def trace(params, x, t, y):
        with recorded_calls(lambda path: path != '') as calls:
            teacher.network.apply({'params': params}, x, t, y)
        paths.extend(calls)

    paths: list[str] = []
    jax.eval_shape(trace, teacher.params, *denoisers.example_inputs(teacher.info, batch_size=1))
    layers = set(map(layer_at, plan))
    owners: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split('/')
        above = ('/'.join(parts[:i]) for i in range(1, len(parts) + 1))
        owner = next((p for p in above if re.fullmatch(pattern, p)), None)
        if owner is not None or path in layers:
            owners.setdefault(owner or path, [])
    if not any(re.fullmatch(pattern, path) for path in owners):
        raise ValueError(f'reconstruct.blocks={pattern!r} matches no module of the network.')
    for path in plan:
        owner = next(p for p in owners if path == p or path.startswith(f'{p}/'))
        owners[owner].append(path)
    blocks = [Block(path, tuple(layers)) for path, layers in owners.items() if layers]
    return blocks if joint is None else _with_joint(blocks, plan, joint)


def _with_joint(blocks: list[Block], plan: Plan, joint: JointBlock) -> list[Block]:
    taken = tuple(path for path in plan if re.fullmatch(joint.layers, layer_at(path)))
    outputs = tuple(path for path in taken if re.fullmatch(joint.outputs, path))
    if not outputs:
        raise ValueError(
            f'layers={joint.layers!r}, outputs={joint.outputs!r} of the method: expected both to '
            f'match quantized layers, such as {", ".join(list(plan)[:3])}.'
        )
    rest = []
    for block in blocks:
        layers = tuple(path for path in block.layers if path not in taken)
        fixed = tuple(path for path in block.layers if path in taken)
        if layers:
            rest.append(block._replace(layers=layers, fixed=fixed))
    return [Block('', taken, outputs=outputs), *rest]


def select(state: PyTree, layers: Mapping[str, Any] | tuple[str, ...], plan: Plan) -> PyTree:
    """The part of a state that belongs to `layers`; see `methods.base`."""
    if not isinstance(state, dict):
        return state
    if any(name in plan for name in state):
        return {path: entry for path, entry in state.items() if path in layers}
    return {name: select(entry, layers, plan) for name, entry in state.items()}


def merge(state: PyTree, part: PyTree) -> PyTree:
    """`state` with what `part`, a part of it, holds."""
    if not isinstance(state, dict):
        return part
    return {
        name: merge(entry, part[name]) if name in part else entry for name, entry in state.items()
    }


def without_inputs(plan: Plan) -> Plan:
    """`plan` with all activations in float."""
    return {
        path: dataclasses.replace(spec, inputs=None)
        for path, spec in plan.items()
        if spec.weight is not None
    }


def learns(block: Block, phase: Phase, plan: Plan) -> bool:
    """Whether a block has anything to learn in a phase."""
    if block.outputs and phase.rounds_inputs:
        return False  # a joint block's activations are not learnt
    return any(_is_learnt(plan[path], phase) for path in block.layers)


def _is_learnt(spec: LayerSpec, phase: Phase) -> bool:
    """Whether a layer has what a phase is about: rounded activations, or else rounded weights."""
    return (spec.inputs if phase.rounds_inputs else spec.weight) is not None
