"""Which grid the output of a softmax gets: powers of two, or an even one; chosen per timestep.

TCAQ-DM's dynamically adaptive quantizer (arXiv:2412.16700): a softmax over many pixels is often
power-law distributed, which a logarithmic grid fits, but not at every timestep. Offline, for each
group of timesteps, the likelihoods of two laws of the values x >= x_min are compared,

    power law    p(x) = (a - 1) / x_min (x / x_min)^-a,   a = 1 + n / sum ln(x / x_min)
    exponential  p(x) = l exp(-l (x - x_min)),            l = n / sum (x - x_min)

both fitted by maximum likelihood; where the power law is the likelier, the grid is scale * 2^-q. At
run time the choice is an entry of a table.

The paper's alternative law, its x_min and the number of groups were not to be found. The
exponential is the usual rival of a power law (arXiv:0706.1062); x_min is a quantile of the values;
groups are even. `choice='error'` compares the errors of the two grids instead. On the bundled
teacher (4 softmaxes, 4 timesteps each) the likelihoods keep the even grid everywhere; by error,
powers would be better in 2 of 16 at 4 bits, by 10 per cent, and nowhere at 8.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dmq_jax.config import AdaptiveSoftmaxConfig
from dmq_jax.methods import base
from dmq_jax.quant import numerics, observers
from dmq_jax.quant.observers import TensorStats
from dmq_jax.quant.plan import Plan, is_softmax
from dmq_jax.quant.tensor import QuantSpec

# A softmax is above 0 but for rounding; smaller values would decide the likelihoods alone.
_SMALLEST = 1e-12


def log_likelihood_ratio(values: Float[Array, '*lead n'], quantile: float) -> Float[Array, '*lead']:
    """Mean of ln p_power - ln p_exponential over the values; above 0: a power law is likelier.

    Args:
      values: at least 0.
      quantile: share of the values that lie below x_min and are left out.
    """
    x = jnp.maximum(values, _SMALLEST)
    x_min = jnp.quantile(x, quantile, axis=-1, keepdims=True)
    is_seen = (x >= x_min).astype(jnp.float32)
    count = jnp.sum(is_seen, axis=-1)

    def mean(terms):
        return jnp.sum(is_seen * terms, axis=-1) / count

    x_min = x_min[..., 0]
    # Floors: where all values are equal, either law is a spike.
    of_logs = jnp.maximum(mean(jnp.log(x / x_min[..., None])), 1e-6)
    excess = jnp.maximum(mean(x - x_min[..., None]), 1e-6 * x_min)
    exponent = 1 + 1 / of_logs
    power_law = jnp.log((exponent - 1) / x_min) - exponent * of_logs
    exponential = -jnp.log(excess) - 1
    return power_law - exponential


def uses_powers(
    stats: TensorStats, table: dict[str, Array], spec: QuantSpec, config: AdaptiveSoftmaxConfig
) -> Bool[Array, 'S']:
    """At which timesteps the grid is logarithmic.

    Args:
      stats: of the tensor, leading axis S.
      table: its even grid, leading axis S.
      spec: of both grids.
      config: rule, groups.
    """
    num_rows = stats.low.shape[0]
    if config.choice in ('uniform', 'powers'):
        return jnp.full((num_rows,), config.choice == 'powers')
    num_groups = min(config.num_groups or num_rows, num_rows)
    groups = np.array_split(np.arange(num_rows), num_groups)
    if config.choice == 'likelihood':
        ratios = [
            log_likelihood_ratio(stats.values[rows].reshape(1, -1), config.quantile)
            for rows in groups
        ]
    else:
        errors = _errors(stats, table, spec)
        ratios = [jnp.mean(errors[rows], keepdims=True) for rows in groups]
    sizes = np.array([len(rows) for rows in groups])
    return jnp.repeat(jnp.concatenate(ratios) > 0, sizes, total_repeat_length=num_rows)


def _errors(stats, table, spec):
    """Mean squared error of the even grid minus that of the logarithmic one, [S]."""
    scale, zero_point = table['scale'][:, None], table['zero_point'][:, None]
    even = numerics.fake_quantize(stats.values, scale, zero_point, *map(float, spec.grid))
    powers = numerics.fake_quantize_powers(
        stats.values, _scale(stats)[:, None], numerics.largest_exponent(spec.bits)
    )
    return jnp.mean((even - stats.values) ** 2 - (powers - stats.values) ** 2, axis=-1)


def _scale(stats: TensorStats) -> Float[Array, 'S']:
    """The scale of a logarithmic grid: its largest value is the tensor's."""
    return jnp.maximum(stats.high, _SMALLEST)


def init(
    plan: Plan, stats: base.Stats, tables: base.Tables, config: AdaptiveSoftmaxConfig
) -> base.Tables:
    """`tables` in which every softmax has the scale of its logarithmic grid, 0 where it is even.

    Args:
      plan: of the layers.
      stats: they were calibrated from.
      tables: from `base.init_inputs`.
      config: how it is chosen.
    """
    result = {path: dict(roles) for path, roles in tables.items()}
    for path, roles in tables.items():
        for role, table in roles.items():
            spec = plan[path].activation(role)
            if not is_softmax(path, role) or spec.symmetric:
                continue
            tensor = stats[path][role]
            tensor = tensor if plan[path].per_timestep else observers.pool(tensor)
            chosen = uses_powers(tensor, table, spec, config)
            result[path][role] = {
                **table,
                # A softmax is not negative, so neither grid needs one.
                'zero_point': jnp.zeros_like(table['zero_point']),
                'powers': jnp.where(chosen, _scale(tensor), 0.0),
            }
    return result
