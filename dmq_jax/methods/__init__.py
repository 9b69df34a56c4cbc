"""Published methods, one file each: pure functions over a learnable pytree."""

from dmq_jax.config import EfficientDMConfig, MethodConfig, RoundToNearestConfig
from dmq_jax.methods import efficientdm, round_to_nearest
from dmq_jax.methods.base import Method
from dmq_jax.quant.plan import Plan

METHODS = {
    RoundToNearestConfig: round_to_nearest.make,
    EfficientDMConfig: efficientdm.make,
}


def make(config: MethodConfig, plan: Plan) -> Method:
    """The method that `config` describes, for the layers of `plan`."""
    return METHODS[type(config)](config, plan)
