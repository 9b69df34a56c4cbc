"""Schema of a run: every option, its unit, its default, and the check that it makes sense.

A config file is Python with `get_config(arg=None)`; it starts from `base()`, adds a `student(...)`
per quantized network, and changes what differs. `main.py` reads it with `config_flags`, applies
`--config.a.b=value` and calls `from_config_dict` once; nothing below sees a ConfigDict.
"""

from dmq_jax.config.checks import FLOAT_BITS
from dmq_jax.config.conversion import describe, from_config_dict, to_dict
from dmq_jax.config.drawing import CalibrateConfig, SamplerConfig, TeacherConfig
from dmq_jax.config.learning import AdaptConfig, DataConfig, FinetuneConfig, ReconstructConfig
from dmq_jax.config.methods import (
    LEARNS_BY,
    AdaptiveSoftmaxConfig,
    BlockLearningConfig,
    ChannelFactorsConfig,
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
    why_not,
)
from dmq_jax.config.quantization import QuantConfig, RuleConfig
from dmq_jax.config.recipes import (
    RECIPES,
    at_widths,
    base,
    compared,
    method_options,
    published,
    quick,
    quick_stage,
    student,
    with_sampler,
)
from dmq_jax.config.run import (
    LEARNING_STAGES,
    Config,
    EvaluateConfig,
    MeshConfig,
    ReportConfig,
    SampleConfig,
    StudentConfig,
)
from dmq_jax.config.training import (
    ClassifierConfig,
    DatasetConfig,
    NetworkConfig,
    TrainTeacherConfig,
)

__all__ = [
    'AdaptConfig',
    'AdaptiveSoftmaxConfig',
    'BlockLearningConfig',
    'CalibrateConfig',
    'ChannelFactorsConfig',
    'ClassifierConfig',
    'Config',
    'DataConfig',
    'DatasetConfig',
    'EfficientDMConfig',
    'EvaluateConfig',
    'FLOAT_BITS',
    'FinetuneConfig',
    'FullFinetuningConfig',
    'LEARNING_STAGES',
    'LEARNS_BY',
    'LSQConfig',
    'MeshConfig',
    'MethodConfig',
    'NetworkConfig',
    'PTQDConfig',
    'QDiffusionConfig',
    'QLoRAConfig',
    'QuantConfig',
    'RECIPES',
    'ReconstructConfig',
    'RepQViTConfig',
    'ReportConfig',
    'RoundToNearestConfig',
    'RuleConfig',
    'SVDQuantConfig',
    'SampleConfig',
    'SamplerConfig',
    'StudentConfig',
    'TCAQDMConfig',
    'TFMQDMConfig',
    'TeacherConfig',
    'TrainTeacherConfig',
    'TuneQDMConfig',
    'at_widths',
    'base',
    'compared',
    'describe',
    'from_config_dict',
    'method_options',
    'published',
    'quick',
    'quick_stage',
    'student',
    'to_dict',
    'why_not',
    'with_sampler',
]
