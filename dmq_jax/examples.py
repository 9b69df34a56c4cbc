"""What a block learns from: inputs of the quantized network, outputs of the float one.

Kept for one block at a time; both networks run batch by batch, split over the devices.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Int, PyTree

from dmq_jax import denoisers
from dmq_jax.blocks import Block, without_inputs
from dmq_jax.quant.layers import recorded_calls
from dmq_jax.quant.plan import Plan
from dmq_jax.runtime import mesh
from dmq_jax.trajectories import Inputs

# Blocks that share a compiled program, which runs the network up to the last of them. One program a
# block would take longer to compile than to run; one for all would run the whole network for the
# first block too.
_SEGMENT = 8


class Examples(NamedTuple):
    """Inputs and targets of one block: `args` and `kwargs` of its call, all batch first."""

    args: tuple
    kwargs: dict[str, Any]
    target: PyTree
    t: Int[Array, 'N']


class Recorder:
    """Runs the networks and keeps what one block is to learn from.

    Args:
      teacher: the float network; its parameters are those given on their own.
      params: of the teacher, on the mesh.
      plan: what is quantized.
      timesteps: of the rows of the student's tables.
      lookup: how a row is found for other timesteps.
      blocks: in the order in which they learn.
      batch_size: of the network's calls.
      device_mesh: what the work is split over.
    """

    def __init__(
        self,
        teacher: denoisers.Denoiser,
        params: PyTree,
        plan: Plan,
        timesteps: Int[np.ndarray, 'S'],
        lookup: str,
        blocks: Sequence[Block],
        *,
        batch_size: int,
        device_mesh: mesh.Mesh,
    ):
        self._network = teacher.network
        self._params = params
        self._plan = plan
        self._timesteps = timesteps
        self._lookup = lookup
        paths = [block.path for block in blocks if not block.outputs]
        self._segments = [tuple(paths[i : i + _SEGMENT]) for i in range(0, len(paths), _SEGMENT)]
        self._batch_size = batch_size
        self._mesh = device_mesh
        # The one program in use, and the modules that its trace has met.
        self._capture: tuple[Any, Callable[..., Any], dict[str, nn.Module]] = None, None, {}

    def record(
        self, block: Block, bound: Any, inputs: Inputs, *, rounds_inputs: bool
    ) -> tuple[nn.Module, Examples]:
        """The module of `block`, free of its network, and what it learns from.

        Args:
          block: one of those given.
          bound: the student, `methods.base.Bound`.
          inputs: of the network.
          rounds_inputs: whether activations are quantized before the block.
        """
        if block.outputs:
            return self._record_joint(block, inputs)
        segment = next(paths for paths in self._segments if block.path in paths)
        capture, modules = self._program(segment, rounds_inputs)
        quantized = denoisers.fake_params(self._params, bound, self._timesteps)
        if not rounds_inputs:
            quantized['tables'] = {}
        args, kwargs, target = self._in_batches(
            lambda part: capture(self._params, quantized, part)[block.path], inputs
        )
        t = mesh.shard_batch(self._mesh, inputs.t)
        return modules[block.path], Examples(args, kwargs, target, t)

    def _program(self, segment, rounds_inputs):
        key, capture, modules = self._capture
        if key == (segment, rounds_inputs):
            return capture, modules
        plan = self._plan if rounds_inputs else without_inputs(self._plan)
        predict = denoisers.QuantizedPredict(
            self._network, tuple(plan.items()), self._lookup, 'fake'
        )
        modules = {}

        @jax.jit
        def capture(params, quantized, inputs):
            params, quantized = mesh.whole(self._mesh, (params, quantized))

            def calls(run):
                with recorded_calls(lambda path: path in segment) as recorded:
                    run()
                return recorded

            x, t, y = inputs
            floats = calls(lambda: self._network.apply({'params': params}, x, t, y))
            students = calls(lambda: predict(quantized, x, t, y))
            modules.update({path: call.module for path, call in students.items()})
            return mesh.split(
                self._mesh,
                {p: (students[p].args, students[p].kwargs, floats[p].output) for p in segment},
            )

        self._capture = (segment, rounds_inputs), capture, modules
        return capture, modules

    def _record_joint(self, block, inputs):
        """Of a joint block: the network's inputs, and the float outputs of some of its layers."""

        @jax.jit
        def capture(params, part):
            params = mesh.whole(self._mesh, params)
            with recorded_calls(lambda path: path in block.outputs) as calls:
                self._network.apply({'params': params}, *part)
            return mesh.split(self._mesh, {path: calls[path].output for path in block.outputs})

        target = self._in_batches(lambda part: capture(self._params, part), inputs)
        inputs = mesh.shard_batch(self._mesh, inputs)
        return self._network, Examples(tuple(inputs), {}, target, inputs.t)

    def _in_batches(self, function, inputs):
        """What `function` makes of `inputs`, a batch at a time, split over the devices."""
        size = min(self._batch_size, len(inputs.t))
        parts = []
        for begin in range(0, len(inputs.t), size):
            part = jax.tree.map(lambda leaf, b=begin: leaf[b : b + size], inputs)
            parts.append(function(mesh.shard_batch(self._mesh, part)))

        @jax.jit
        def join(parts):
            joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
            return mesh.split(self._mesh, joined)

        return join(parts)
