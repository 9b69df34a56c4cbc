"""Published methods, one file each: pure functions over a learnable pytree."""

from dmq_jax.config import (
    EfficientDMConfig,
    FullFinetuningConfig,
    LSQConfig,
    MethodConfig,
    PTQDConfig,
    QDiffusionConfig,
    QLoRAConfig,
    RepQViTConfig,
    RoundToNearestConfig,
    SVDQuantConfig,
    TCAQDMConfig,
    TFMQDMConfig,
    TuneQDMConfig,
)
from dmq_jax.methods import (
    efficientdm,
    full_finetuning,
    lsq,
    ptqd,
    qdiffusion,
    qlora,
    repq_vit,
    round_to_nearest,
    svdquant,
    tcaq_dm,
    tfmq_dm,
    tuneqdm,
)
from dmq_jax.methods.base import Method
from dmq_jax.quant.plan import Plan

METHODS = {
    RoundToNearestConfig: round_to_nearest.make,
    EfficientDMConfig: efficientdm.make,
    FullFinetuningConfig: full_finetuning.make,
    LSQConfig: lsq.make,
    PTQDConfig: ptqd.make,
    QDiffusionConfig: qdiffusion.make,
    QLoRAConfig: qlora.make,
    RepQViTConfig: repq_vit.make,
    SVDQuantConfig: svdquant.make,
    TCAQDMConfig: tcaq_dm.make,
    TFMQDMConfig: tfmq_dm.make,
    TuneQDMConfig: tuneqdm.make,
}


def make(config: MethodConfig, plan: Plan, num_train_timesteps: int = 1000) -> Method:
    """The method that `config` describes, for the layers of `plan`.

    Args:
      config: of one of the methods.
      plan: what is quantized.
      num_train_timesteps: of the teacher's schedule; some methods divide it into intervals.
    """
    return METHODS[type(config)](config, plan, num_train_timesteps)
