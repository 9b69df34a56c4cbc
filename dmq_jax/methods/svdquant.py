"""SVDQuant: what 4 bits cannot hold goes through a thin branch in 16 bits, kept at inference.

Li et al., ICLR 2025, arXiv:2411.05007, as in the authors' `deepcompressor`. In three steps:

1. channels are smoothed, X / r and r W (`channel_factors`, rule 'balanced');
2. r W = L + R with L = down up of rank 32 from the singular value decomposition, so that R, which
   is rounded, has lost its largest directions. L is fitted again to what the rounding of R left,
   r W - Q(R), as long as that helps;
3. y = Q(X / r) Q(R) + (X / r) down up, the branch on the input before rounding.

Nothing is learnt. Where this differs from the authors' code, on purpose:

* scales of activations are those of the plan, calibrated, not one per group of 64 values of the
  live input; groups of the weight are `quant.weight_group_size=64`;
* the exponent of the smoothing is an option, not searched per layer;
* R is rounded to nearest; GPTQ is left out, as in the paper's first rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dmq_jax.config import SVDQuantConfig
from dmq_jax.methods import base, channel_factors, low_rank
from dmq_jax.quant import numerics, observers
from dmq_jax.quant.plan import Plan
from dmq_jax.quant.tensor import QuantSpec, expand


def make(config: SVDQuantConfig, plan: Plan, num_train_timesteps: int) -> base.Method:
    """The method for the layers of `plan`; layers not marked trainable are only rounded."""
    del num_train_timesteps

    def init(params, stats, key):
        del key
        factors = channel_factors.init(plan, params, stats, config.channels)
        params = channel_factors.fold(params, factors)
        branches = init_branches(plan, params, config.rank, config.num_refits)
        weights = base.init_weights(plan, low_rank.subtract(params, branches))
        stats = channel_factors.scale_stats(stats, factors)
        return {
            'weight': weights,
            'input': base.init_inputs(plan, stats),
            'branch': branches,
            'channels': factors,
        }

    def bind(params, state):
        params = channel_factors.fold(params, state['channels'])
        params = low_rank.subtract(params, state['branch'])
        weights = {
            path: base.quantize_weight(base.get_kernel(params, path), **scale, spec=plan[path])
            for path, scale in state['weight'].items()
        }
        return base.Bound(
            weights,
            state['input'],
            channels=channel_factors.channels(state['channels']),
            branches=state['branch'],
        )

    return base.Method(
        init, bind, base.output_loss, base.frozen,
        channel_stats=channel_factors.is_on(config.channels),
    )  # fmt: skip


def init_branches(
    plan: Plan, params: PyTree, rank: int, num_refits: int
) -> dict[str, dict[str, Float[Array, '...']]]:
    """The branch of every layer that is rounded and trainable; see `split`."""
    kernels = {
        path: base.get_kernel(params, path)
        for path, spec in sorted(plan.items())
        if spec.weight is not None and spec.trainable
    }
    return base.map_alike(
        lambda kernel, spec: split(kernel, spec, rank, num_refits),
        kernels,
        {path: plan[path].weight for path in kernels},
    )


def split(
    kernel: Float[Array, '... K N'], spec: QuantSpec, rank: int, num_refits: int
) -> dict[str, Float[Array, '...']]:
    """The branch of a kernel: 'down' [..., K, R] and 'up' [R, N], of values that float16 holds.

    Args:
      kernel: of a Dense or a Conv layer.
      spec: how the rest is rounded.
      rank: R; more than the smaller side of the kernel is cut to it.
      num_refits: how often, at most, the branch is fitted to what rounding left.
    """
    rank = min(rank, kernel.size // kernel.shape[-1], kernel.shape[-1])

    def fit(target: Array) -> dict[str, Array]:
        u, s, v = jnp.linalg.svd(target.reshape(-1, target.shape[-1]), full_matrices=False)
        # Both halves of one size: neither leaves the range of float16.
        root = jnp.sqrt(s[:rank])
        down = (u[:, :rank] * root[None]).reshape(*kernel.shape[:-1], rank)
        halves = {'down': down, 'up': v[:rank] * root[:, None]}
        return low_rank.as_stored(halves)

    def rounded(branch: dict[str, Array]) -> Array:
        rest = kernel - low_rank.delta(branch)
        scale, zero_point = observers.calibrate_weight(rest, spec)
        whole = expand(scale, rest.shape), expand(zero_point, rest.shape)
        return numerics.dequantize(numerics.quantize(rest, *whole, *spec.grid), *whole)

    def error(branch: dict[str, Array], rest: Array) -> Array:
        return jnp.sum((kernel - low_rank.delta(branch) - rest) ** 2)

    def again(best, _):
        branch, rest, least = best
        new = fit(kernel - rest)
        new_rest = rounded(new)
        value = error(new, new_rest)
        # From where it got worse, the same branch comes out again: the authors' early stop.
        better = value < least
        return jax.tree.map(
            lambda a, b: jnp.where(better, a, b), (new, new_rest, value), (branch, rest, least)
        ), None

    first = fit(kernel)
    rest = rounded(first)
    start = first, rest, error(first, rest)
    (branch, _, _), _ = jax.lax.scan(again, start, None, length=num_refits)
    return branch
