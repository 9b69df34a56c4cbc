"""Options of the published methods, one class each, and the stage by which each one learns."""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

from dmq_jax.config.checks import check, check_at_least, check_choices, check_patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearestConfig:
    """The baseline: calibrated ranges, rounding to nearest, nothing learnt."""

    name: Literal['round_to_nearest'] = 'round_to_nearest'

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChannelFactorsConfig:
    """Factors of input channels, folded into the weights (`methods/channel_factors.py`)."""

    # 'smallest': exponent of the factors, 1 is TCAQ-DM's; 'balanced': share of the input's range
    # that moves into the weight, SmoothQuant's 0.5; 0: no factors
    strength: float = 1.0
    # bring every channel down to the smallest one's range, or share ranges with the weight
    rule: Literal['smallest', 'balanced'] = 'smallest'
    limit: float | None = None  # of a factor; None: TCAQ-DM's 3 where W4A8, else none

    def __post_init__(self):
        check_choices(self)
        check(0 <= self.strength <= 1, f'strength={self.strength}: expected 0..1.')
        if self.limit is not None:
            check_at_least(self, 1, 'limit')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EfficientDMConfig:
    """Low-rank fine-tuning with per-timestep scales (He et al., ICLR 2024, arXiv:2310.03270)."""

    name: Literal['efficientdm'] = 'efficientdm'
    lora_rank: int = 32  # inner dimension of the low-rank weight update
    # learning rate of the update per unit of weight scale; the authors' 1/2500 is for 16,000
    # iterations, in a few hundred 1/100 ends nearer to the teacher
    lora_rate_per_scale: float = 1 / 100
    weight_scale_learning_rate: float = 5e-3  # Adam, per unit of each weight scale
    input_scale_learning_rate: float = 1e-2  # Adam, per unit of each activation scale
    zero_point_learning_rate: float = 5e-2  # Adam, in integer steps
    # Adam, of biases and of the scales of normalizations, which stay in float; 0: not trained
    affine_learning_rate: float = 2e-3
    base: Literal['float', 'dequantized'] = 'float'  # weights the low-rank update is added to
    scale_aware: bool = True  # update rate proportional to each layer's weight scale
    # TCAQ-DM's factors of input channels, before the low-rank update; the paper has none
    channels: ChannelFactorsConfig = ChannelFactorsConfig(strength=0.0)
    # 'output': compare predictions; 'feature': also what the modules `feature_layers` put out
    loss: Literal['output', 'feature'] = 'feature'
    feature_layers: str = r'(.*/)?(block|attention)_\d+'  # regular expression over module paths
    feature_weight: float = 0.1  # of the features' relative error, beside the output's
    # of SVDQuant's branch in 16 bits beside every trained layer, kept at inference; 0: none, as in
    # the paper
    branch_rank: int = 0
    branch_refits: int = 4  # at most, of the branch to what rounding left
    branch_learning_rate: float = 1e-3  # Adam, of both halves of the branch

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'lora_rank')
        check_at_least(self, 0, 'branch_rank', 'branch_refits', 'branch_learning_rate')
        rates = 'lora_rate_per_scale', 'weight_scale_learning_rate', 'input_scale_learning_rate'
        rates += 'zero_point_learning_rate', 'affine_learning_rate'
        check_at_least(self, 0, *rates, 'feature_weight')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSQConfig:
    """Training of all weights and steps (Esser et al., ICLR 2020, arXiv:1902.08153)."""

    name: Literal['lsq'] = 'lsq'
    rate_per_scale: float = 1 / 100  # Adam, of a weight, per unit of its layer's weight scale
    weight_scale_learning_rate: float = 5e-3  # Adam, per unit of each weight scale
    input_scale_learning_rate: float = 1e-2  # Adam, per unit of each activation scale
    zero_point_learning_rate: float = 5e-2  # Adam, in integer steps
    # Adam, of biases and of the scales of normalizations, which stay in float; 0: not trained
    affine_learning_rate: float = 2e-3

    def __post_init__(self):
        check_choices(self)
        rates = 'rate_per_scale', 'weight_scale_learning_rate', 'input_scale_learning_rate'
        check_at_least(self, 0, *rates, 'zero_point_learning_rate', 'affine_learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLearningConfig:
    """How block reconstruction learns: AdaRound and LSQ as BRECQ's code has them."""

    # Adam, of the variables that decide the rounding; None: 20 over the iterations, as the papers'
    # 1e-3 over 20,000, so that all get where they are decided, 2.4 from the middle
    rounding_learning_rate: float | None = None
    penalty_weight: float = 0.01  # of what drives every decision to 0 or 1, beside the error
    warm_up: float = 0.2  # share of the iterations without that penalty
    beta_start: float = 20.0  # exponent of the penalty after the warm-up...
    beta_end: float = 2.0  # ...and at the end
    input_share: float = 0.25  # iterations for the scales of activations per one for the rounding
    input_scale_learning_rate: float = 4e-3  # Adam, per unit of each activation scale
    input_error_norm: float = 2.4  # exponent of the error that the scales are learnt with
    # a layer that is a block by itself takes the mean error it is left with into its bias: that of
    # the last layer adds up over a trajectory
    correct_bias: bool = True

    def __post_init__(self):
        check_at_least(self, 0, 'input_scale_learning_rate')
        if self.rounding_learning_rate is not None:
            check_at_least(self, 0, 'rounding_learning_rate')
        check_at_least(self, 0, 'penalty_weight', 'beta_start', 'beta_end', 'input_share')
        check_at_least(self, 1, 'input_error_norm')
        check(0 <= self.warm_up < 1, f'warm_up={self.warm_up}: expected 0..1 (below 1).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QDiffusionConfig:
    """Learnt rounding on inputs from all timesteps (Li et al., ICCV 2023, arXiv:2302.04304)."""

    name: Literal['qdiffusion'] = 'qdiffusion'
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTQDConfig:
    """Correction of the prediction while sampling (He et al., NeurIPS 2023, arXiv:2305.10657)."""

    name: Literal['ptqd'] = 'ptqd'
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TFMQDMConfig:
    """The path of the timestep by itself (Huang et al., CVPR 2024, arXiv:2311.16503)."""

    name: Literal['tfmq_dm'] = 'tfmq_dm'
    # regular expressions over paths of layers: through which the timestep enters, and of these
    # where it meets the image
    layers: str = r'(time|added)_embed/.*|(.*/)?time_proj'
    outputs: str = r'(.*/)?time_proj'
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        check_choices(self)
        check_patterns(self, 'layers', 'outputs')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepQViTConfig:
    """Scales of channels moved into the weights (Li et al., ICCV 2023, arXiv:2212.08254)."""

    name: Literal['repq_vit'] = 'repq_vit'
    # regular expression over paths: the dense layers that follow a norm
    layers: str = r'.*/(attention(_\d+)?|attn1)/(q|k|v)|.*/attn2/q|.*/(ff_in|mlp/dense_0)'
    softmax: Literal['roots', 'uniform'] = 'roots'  # powers of sqrt(2), or an even grid

    def __post_init__(self):
        check_choices(self)
        check_patterns(self, 'layers')


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveSoftmaxConfig:
    """Whether what attention multiplies the values by lies on an even grid or on powers of two."""

    # 'likelihood': powers where a power law is the likelier, per group of timesteps (TCAQ-DM);
    # 'error': where their error is the smaller; 'uniform', 'powers': always
    choice: Literal['likelihood', 'error', 'uniform', 'powers'] = 'likelihood'
    num_groups: int | None = None  # groups of timesteps that choose; None: each for itself
    quantile: float = 0.1  # share of the values, the smallest, that the likelihoods leave out

    def __post_init__(self):
        check_choices(self)
        if self.num_groups is not None:
            check_at_least(self, 1, 'num_groups')
        check(0 <= self.quantile < 1, f'quantile={self.quantile}: expected 0..1 (below 1).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCAQDMConfig:
    """Channel factors, adaptive softmax, aligned rounds (Huang et al., arXiv:2412.16700)."""

    name: Literal['tcaq_dm'] = 'tcaq_dm'
    channels: ChannelFactorsConfig = ChannelFactorsConfig()
    softmax: AdaptiveSoftmaxConfig = AdaptiveSoftmaxConfig()
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVDQuantConfig:
    """A branch of low rank in 16 bits beside the integers (Li et al., arXiv:2411.05007)."""

    name: Literal['svdquant'] = 'svdquant'
    rank: int = 32  # of the branch
    num_refits: int = 4  # at most, of the branch to what rounding left; the authors allow 100
    channels: ChannelFactorsConfig = ChannelFactorsConfig(
        strength=0.5, rule='balanced', limit=100.0
    )

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'rank')
        check_at_least(self, 0, 'num_refits')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneQDMConfig:
    """Scales alone are tuned, the integers stand (Ryu et al., ECCV 2024, arXiv:2401.04339)."""

    name: Literal['tuneqdm'] = 'tuneqdm'
    num_experts: int = 2  # sets of scales, each for an equal interval of the training timesteps
    # 'both': of output and input channels; 'output': of output channels alone, which is PEQA
    # (arXiv:2305.14152)
    scales: Literal['both', 'output'] = 'both'
    # Adam, per unit of each scale; the authors' code has 3e-6 in absolute units, for 400 steps of
    # batch 1
    learning_rate: float = 1e-3
    # standard deviation around 1 of the first input scales: the paper draws them from N(1, 0.01),
    # its code starts at 1
    input_spread: float = 0.0

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'num_experts')
        check_at_least(self, 0, 'learning_rate', 'input_spread')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QLoRAConfig:
    """An update of low rank beside integers that stand (Dettmers et al., arXiv:2305.14314)."""

    name: Literal['qlora'] = 'qlora'
    rank: int = 32  # of the update; TuneQDM's comparison has 32 and 2
    learning_rate: float = 1e-3  # Adam, of both halves of the update

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'rank')
        check_at_least(self, 0, 'learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFinetuningConfig:
    """Every parameter is trained; with 32 bits nothing is rounded: what the others spare."""

    name: Literal['full_finetuning'] = 'full_finetuning'
    learning_rate: float = 2e-4  # Adam; DDPM's own on CIFAR-10 (arXiv:2006.11239)

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 0, 'learning_rate')


# chosen by the field `name`
MethodConfig = (
    RoundToNearestConfig
    | EfficientDMConfig
    | FullFinetuningConfig
    | LSQConfig
    | PTQDConfig
    | QDiffusionConfig
    | QLoRAConfig
    | RepQViTConfig
    | SVDQuantConfig
    | TCAQDMConfig
    | TFMQDMConfig
    | TuneQDMConfig
)
# The stage by which a method learns, as its paper has it; None: it only calibrates.
LEARNS_BY: Mapping[str, str | None] = types.MappingProxyType(
    {
        'round_to_nearest': None,
        'efficientdm': 'finetune',
        'full_finetuning': 'adapt',
        'lsq': 'finetune',
        'ptqd': 'reconstruct',
        'qdiffusion': 'reconstruct',
        'qlora': 'adapt',
        'repq_vit': None,
        'svdquant': None,
        'tcaq_dm': 'reconstruct',
        'tfmq_dm': 'reconstruct',
        'tuneqdm': 'adapt',
    }
)


def why_not(stage: str, method: MethodConfig) -> str | None:
    """Why a method has no such stage of learning, after its name in a sentence; None: it has."""
    own = LEARNS_BY[method.name]
    if own is None:
        return 'learns nothing'
    if stage == 'reconstruct' and own != 'reconstruct':
        return 'does not learn block by block'
    if stage == 'adapt' and isinstance(method, EfficientDMConfig) and method.loss == 'feature':
        return "compares features of the teacher, which images have none of, unless loss='output'"
    return None
