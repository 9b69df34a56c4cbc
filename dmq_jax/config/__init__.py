"""Schema of a run: every option, its unit, its default, and the check that it makes sense.

A config file is Python with `get_config(arg=None)`; it starts from `base()`, adds a `student(...)`
per quantized network, and changes what differs. `main.py` reads it with `config_flags`, applies
`--config.a.b=value` and calls `from_config_dict` once; nothing below sees a ConfigDict.
"""

import dataclasses
import difflib
import functools
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar('T')

FLOAT_BITS = 32  # a width of 32 bits means: leave the tensor in floating point


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {near[0]!r}?' if near else ''


def _check(holds: bool, text: str) -> None:
    if not holds:
        raise ValueError(text)


def _check_choice(name: str, value: Any, hint: Any) -> None:
    choices = typing.get_args(hint)
    if value not in choices:
        near = _nearest(value, choices) if isinstance(value, str) else ''
        expected = ', '.join(map(repr, choices))
        raise ValueError(f'{name}={value!r}: expected one of {expected}{near or "."}')


def _check_choices(config: Any) -> None:
    """Every field typed `Literal[...]` of `config` holds one of its values."""
    for name, hint in _hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            _check_choice(name, getattr(config, name), hint)


def _check_at_least(config: Any, minimum: int, *names: str) -> None:
    """The numbers called `names` of `config` are finite and not below `minimum`."""
    for name in names:
        value = getattr(config, name)
        holds = math.isfinite(value) and value >= minimum
        _check(holds, f'{name}={value}: expected at least {minimum}.')


def _check_bits(name: str, bits: int) -> None:
    valid = 2 <= bits <= 8 or bits == FLOAT_BITS
    _check(valid, f'{name}={bits}: expected 2..8, or {FLOAT_BITS} to stay in floating point.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The float network that is quantized."""

    path: str = 'fashion_mnist'  # name of a bundled teacher, or a checkpoint file or folder
    # of a diffusers folder whose class table has a row more, the null class that guidance needs;
    # None: every row is a class
    num_classes: int | None = None
    # what wrote the checkpoint; 'auto': told by the names of its tensors
    kind: Literal[
        'auto', 'dmq_jax', 'diffusers', 'compvis', 'adm', 'ddim', 'dit', 'pixart'
    ] = 'auto'  # fmt: skip
    # what a single file does not tell: a published name, such as 'cin256-v2', or a JSON file
    # {"network": {...}, "process": {...}}; see checkpoints/options.py
    settings: str | None = None
    # a diffusers folder that holds what the checkpoint lacks: vae/, text_encoder/, tokenizer/
    components: str | None = None
    ema: bool | None = None  # moving average or weights; None: as the original's samplers do
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the parameters on the device
    negative_prompt: str | None = None  # the null condition of guidance; None: the empty text
    # of an upsampler: an .npz with the small images as arr_0 and their classes as arr_1; image i of
    # a run is made of small image i, and again from the first
    low_res: str | None = None

    def __post_init__(self):
        _check_choices(self)
        _check(bool(self.path), "path='': expected a bundled name, a file or a folder.")
        if self.num_classes is not None:
            _check_at_least(self, 1, 'num_classes')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How images are drawn from a denoiser."""

    # update rule; 'plms' is the PNDM of Stable Diffusion, 'pndm' starts it with Runge-Kutta
    name: Literal['ddim', 'ddpm', 'dpm_solver', 'plms', 'pndm', 'euler'] = 'ddim'
    # network evaluations per image (before guidance doubles them); plms takes 1 more, pndm 9
    num_steps: int = 20
    # which training timesteps are visited; see diffusion.schedule.sampling_timesteps. 'karras':
    # levels of noise instead, dpm_solver and euler only
    spacing: Literal[
        'uniform', 'quadratic', 'leading', 'trailing', 'linspace', 'compvis_uniform',
        'compvis_quad', 'dpm_leading', 'dpm_linspace', 'adm', 'adm_ddim', 'karras',
    ] = 'uniform'  # fmt: skip
    steps_offset: int = 0  # added to the timesteps of 'leading' and 'dpm_leading'
    # visits to each of equal sections of the schedule, lowest timesteps first; (): one; 'adm' only
    sections: tuple[int, ...] = ()
    eta: float = 0.0  # share of fresh noise in [0, 1]; 0 is deterministic; DDIM only
    # of the noise of ddpm, and no other; 'learned_range': the network predicts it
    variance: Literal['fixed_small', 'fixed_large', 'learned_range'] = 'fixed_small'
    clip_sample: float | None = None  # predicted images are clipped to [-this, this]; None: not
    # share of the signal after the last step: all of it, or that of the first training timestep
    final_alpha: Literal['one', 'first'] = 'one'
    # of the last step, dpm_solver only; 'auto': first below 15 steps or where no noise is left
    final_order: Literal['auto', 'first', 'second'] = 'auto'
    guidance_scale: float = 1.0  # classifier-free guidance weight; 1 is none

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, 'num_steps')
        _check_at_least(self, 0, 'guidance_scale')
        _check(0 <= self.eta <= 1, f'eta={self.eta}: expected 0..1.')
        _check(
            self.eta == 0 or self.name == 'ddim',
            f'eta={self.eta} with name={self.name!r}: only ddim has an eta; set eta=0.0.',
        )
        fewest = {'plms': 2, 'pndm': 4}.get(self.name, 1)
        _check(
            self.num_steps >= fewest,
            f'num_steps={self.num_steps} with name={self.name!r}: expected at least {fewest}.',
        )
        _check_at_least(self, 0, 'steps_offset')
        _check(
            self.steps_offset == 0 or self.spacing in ('leading', 'dpm_leading'),
            f'steps_offset={self.steps_offset} with spacing={self.spacing!r}: only leading and '
            f'dpm_leading have an offset; set steps_offset=0.',
        )
        is_divided = self.spacing == 'adm' and sum(self.sections) == self.num_steps
        _check(
            not self.sections or (is_divided and min(self.sections) >= 1),
            f'sections={self.sections} with spacing={self.spacing!r}: expected (), or '
            f"spacing='adm' and positive numbers of sum num_steps={self.num_steps}.",
        )
        _check(
            self.spacing != 'karras' or self.name in ('dpm_solver', 'euler'),
            f"spacing='karras' with name={self.name!r}: only dpm_solver and euler go by the level "
            f'of noise; choose another spacing.',
        )
        _check(
            self.variance == 'fixed_small' or self.name == 'ddpm',
            f'variance={self.variance!r} with name={self.name!r}: only ddpm has a choice; set '
            f"variance='fixed_small'.",
        )
        _check(
            self.clip_sample is None or 0 < self.clip_sample < math.inf,
            f'clip_sample={self.clip_sample}: expected None or a number above 0.',
        )
        _check(
            self.final_order == 'auto' or self.name == 'dpm_solver',
            f'final_order={self.final_order!r} with name={self.name!r}: only dpm_solver has a '
            f"choice; set final_order='auto'.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """How activation statistics are collected: the teacher samples while it is observed."""

    num_images: int = 64  # images sampled; a multiple of `batch_size`, or less than it
    batch_size: int = 32  # images per network call
    # activation values, and pairs of block extremes, kept per tensor, timestep and batch
    values_per_tensor: int = 1024
    sampler: SamplerConfig = SamplerConfig()  # its timesteps become the rows of the scale tables

    def __post_init__(self):
        _check_at_least(self, 1, 'num_images', 'batch_size', 'values_per_tensor')
        # A last partial batch would be a second program, and count less than its images.
        _check(
            self.num_images <= self.batch_size or self.num_images % self.batch_size == 0,
            f'num_images={self.num_images}: expected a multiple of batch_size={self.batch_size}, '
            f'or less than it.',
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """The widths of the layers whose whole path matches a pattern; the first match wins."""

    pattern: str  # regular expression over paths like 'down_0/block_0/conv1'
    weight_bits: int | None = None  # 2..8, 32 for float; None: the student's `weight_bits`
    activation_bits: int | None = None  # 2..8, 32 for float; None: its `activation_bits`
    # contraction entries per scale, 0 for one scale per channel; None: its `weight_group_size`
    weight_group_size: int | None = None

    def __post_init__(self):
        _check(bool(self.pattern), "pattern='': expected a regular expression; all layers: '.*'.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            text = f'pattern={self.pattern!r}: not a regular expression ({error}).'
            raise ValueError(text) from None
        for name in ('weight_bits', 'activation_bits'):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        if self.weight_group_size is not None:
            _check_at_least(self, 0, 'weight_group_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """Which tensors become integers, how wide, and how their range is chosen."""

    weight_bits: int = 4  # 2..8, or 32 for float
    activation_bits: int = 4  # 2..8, or 32 for float
    # 'paper': the layers the papers quantize; 'full': every one; 'rules': those `rules` name
    coverage: Literal['paper', 'full', 'rules'] = 'paper'
    rules: tuple[RuleConfig, ...] = ()  # tried before the coverage's own; first match wins
    weight_symmetric: bool = True  # grid [-2^(b-1), 2^(b-1)-1] around zero, no zero point
    weight_group_size: int | None = None  # contraction entries per scale; None: per channel
    activation_symmetric: bool = False  # False: grid [0, 2^b-1] with a zero point
    weight_observer: Literal['minmax', 'percentile', 'mse'] = 'mse'  # range of the weights
    activation_observer: Literal['minmax', 'percentile', 'mse'] = 'mse'  # range of activations
    percentile: float = 99.9  # per cent of the values covered by a 'percentile' observer
    per_timestep: bool = True  # one activation scale per timestep instead of one for all
    timestep_lookup: Literal['nearest', 'linear'] = 'nearest'  # row of a table for any t
    # layers fed with a tensor and a skip beside it quantize the two parts of input and kernel
    # separately (Q-Diffusion)
    split_shortcuts: bool = False
    # 2..8 or 16: width of what attention multiplies the values by, unsigned with zero point 0
    # (Q-Diffusion: 8, and 16 for Stable Diffusion); None: as other activations
    softmax_bits: int | None = None

    def __post_init__(self):
        _check_choices(self)
        _check_bits('weight_bits', self.weight_bits)
        _check_bits('activation_bits', self.activation_bits)
        _check(50 < self.percentile <= 100, f'percentile={self.percentile}: expected 50..100.')
        if self.softmax_bits is not None:
            valid = 2 <= self.softmax_bits <= 8 or self.softmax_bits == 16
            _check(valid, f'softmax_bits={self.softmax_bits}: expected 2..8, 16, or None.')
        if self.weight_group_size is not None:
            _check_at_least(self, 1, 'weight_group_size')
        _check(
            self.coverage != 'rules' or bool(self.rules),
            "coverage='rules' with rules=(): list the rules, or use 'paper' or 'full'.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearestConfig:
    """The baseline: calibrated ranges, rounding to nearest, nothing learnt."""

    name: Literal['round_to_nearest'] = 'round_to_nearest'

    def __post_init__(self):
        _check_choices(self)


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
        _check_choices(self)
        _check(0 <= self.strength <= 1, f'strength={self.strength}: expected 0..1.')
        if self.limit is not None:
            _check_at_least(self, 1, 'limit')


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
        _check_choices(self)
        _check_at_least(self, 1, 'lora_rank')
        _check_at_least(self, 0, 'branch_rank', 'branch_refits', 'branch_learning_rate')
        rates = 'lora_rate_per_scale', 'weight_scale_learning_rate', 'input_scale_learning_rate'
        rates += 'zero_point_learning_rate', 'affine_learning_rate'
        _check_at_least(self, 0, *rates, 'feature_weight')


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
        _check_choices(self)
        rates = 'rate_per_scale', 'weight_scale_learning_rate', 'input_scale_learning_rate'
        _check_at_least(self, 0, *rates, 'zero_point_learning_rate', 'affine_learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLearningConfig:
    """How block reconstruction learns: AdaRound and LSQ as BRECQ's code has them."""

    rounding_learning_rate: float = 1e-3  # Adam, of the variables that decide the rounding
    penalty_weight: float = 0.01  # of what drives every decision to 0 or 1, beside the error
    warm_up: float = 0.2  # share of the iterations without that penalty
    beta_start: float = 20.0  # exponent of the penalty after the warm-up...
    beta_end: float = 2.0  # ...and at the end
    input_share: float = 0.25  # iterations for the scales of activations per one for the rounding
    input_scale_learning_rate: float = 4e-3  # Adam, per unit of each activation scale
    input_error_norm: float = 2.4  # exponent of the error that the scales are learnt with

    def __post_init__(self):
        _check_at_least(self, 0, 'rounding_learning_rate', 'input_scale_learning_rate')
        _check_at_least(self, 0, 'penalty_weight', 'beta_start', 'beta_end', 'input_share')
        _check_at_least(self, 1, 'input_error_norm')
        _check(0 <= self.warm_up < 1, f'warm_up={self.warm_up}: expected 0..1 (below 1).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QDiffusionConfig:
    """Learnt rounding on inputs from all timesteps (Li et al., ICCV 2023, arXiv:2302.04304)."""

    name: Literal['qdiffusion'] = 'qdiffusion'
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        _check_choices(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTQDConfig:
    """Correction of the prediction while sampling (He et al., NeurIPS 2023, arXiv:2305.10657)."""

    name: Literal['ptqd'] = 'ptqd'
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        _check_choices(self)


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
        _check_choices(self)
        for name in ('layers', 'outputs'):
            pattern = getattr(self, name)
            try:
                re.compile(pattern)
            except re.error as error:
                text = f'{name}={pattern!r}: not a regular expression ({error}).'
                raise ValueError(text) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepQViTConfig:
    """Scales of channels moved into the weights (Li et al., ICCV 2023, arXiv:2212.08254)."""

    name: Literal['repq_vit'] = 'repq_vit'
    # regular expression over paths: the dense layers that follow a norm
    layers: str = r'.*/(attention(_\d+)?|attn1)/(q|k|v)|.*/attn2/q|.*/(ff_in|mlp/dense_0)'
    softmax: Literal['roots', 'uniform'] = 'roots'  # powers of sqrt(2), or an even grid

    def __post_init__(self):
        _check_choices(self)
        try:
            re.compile(self.layers)
        except re.error as error:
            text = f'layers={self.layers!r}: not a regular expression ({error}).'
            raise ValueError(text) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveSoftmaxConfig:
    """Whether what attention multiplies the values by lies on an even grid or on powers of two."""

    # 'likelihood': powers where a power law is the likelier, per group of timesteps (TCAQ-DM);
    # 'error': where their error is the smaller; 'uniform', 'powers': always
    choice: Literal['likelihood', 'error', 'uniform', 'powers'] = 'likelihood'
    num_groups: int | None = None  # groups of timesteps that choose; None: each for itself
    quantile: float = 0.1  # share of the values, the smallest, that the likelihoods leave out

    def __post_init__(self):
        _check_choices(self)
        if self.num_groups is not None:
            _check_at_least(self, 1, 'num_groups')
        _check(0 <= self.quantile < 1, f'quantile={self.quantile}: expected 0..1 (below 1).')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCAQDMConfig:
    """Channel factors, adaptive softmax, aligned rounds (Huang et al., arXiv:2412.16700)."""

    name: Literal['tcaq_dm'] = 'tcaq_dm'
    channels: ChannelFactorsConfig = ChannelFactorsConfig()
    softmax: AdaptiveSoftmaxConfig = AdaptiveSoftmaxConfig()
    learning: BlockLearningConfig = BlockLearningConfig()

    def __post_init__(self):
        _check_choices(self)


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
        _check_choices(self)
        _check_at_least(self, 1, 'rank')
        _check_at_least(self, 0, 'num_refits')


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
        _check_choices(self)
        _check_at_least(self, 1, 'num_experts')
        _check_at_least(self, 0, 'learning_rate', 'input_spread')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QLoRAConfig:
    """An update of low rank beside integers that stand (Dettmers et al., arXiv:2305.14314)."""

    name: Literal['qlora'] = 'qlora'
    rank: int = 32  # of the update; TuneQDM's comparison has 32 and 2
    learning_rate: float = 1e-3  # Adam, of both halves of the update

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, 'rank')
        _check_at_least(self, 0, 'learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullFinetuningConfig:
    """Every parameter is trained; with 32 bits nothing is rounded: what the others spare."""

    name: Literal['full_finetuning'] = 'full_finetuning'
    learning_rate: float = 2e-4  # Adam; DDPM's own on CIFAR-10 (arXiv:2006.11239)

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 0, 'learning_rate')


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Block by block towards the teacher, for methods that learn so; before fine-tuning."""

    num_iterations: int = 0  # optimizer steps per block and pass; 0: none. The papers' 20,000
    batch_size: int = 32  # samples per optimizer step
    # kept in memory at the input and the output of one block at a time: this many timesteps, evenly
    # spaced on the trajectories, times images, times 2 with guidance; the papers' 20 x 256
    num_timesteps: int = 20
    num_images: int = 256
    sampler: SamplerConfig = SamplerConfig()  # draws the trajectories
    # regular expression over module paths; an outermost module it matches whole is one block, each
    # quantized layer outside of them is one by itself
    blocks: str = r'(.*/)?((block|attention)_\d+|downsample|upsample)'
    # rounds after the first draw their inputs with the student of the round before (TCAQ-DM)
    num_rounds: int = 1
    later_share: float = 0.5  # iterations of a later round per one of the first

    def __post_init__(self):
        _check_at_least(self, 0, 'num_iterations')
        _check_at_least(self, 1, 'batch_size', 'num_timesteps', 'num_images', 'num_rounds')
        _check(0 < self.later_share <= 1, f'later_share={self.later_share}: expected 0..1.')
        _check(
            self.num_timesteps <= self.sampler.num_steps,
            f'num_timesteps={self.num_timesteps}: expected at most the '
            f'{self.sampler.num_steps} steps of its sampler.',
        )
        try:
            re.compile(self.blocks)
        except re.error as error:
            text = f'blocks={self.blocks!r}: not a regular expression ({error}).'
            raise ValueError(text) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Distillation of the teacher into the student, for methods that learn."""

    num_iterations: int = 0  # optimizer steps; 0: calibrate only
    batch_size: int = 16  # images per optimizer step
    sampler: SamplerConfig = SamplerConfig()  # draws the x_t the two are compared at
    # 'trajectory': a batch descends all timesteps together; 'staggered': one start per image
    positions: Literal['trajectory', 'staggered'] = 'staggered'
    # who leads the trajectories: 'student' meets the errors it has made before, as in sampling
    drawn_by: Literal['teacher', 'student'] = 'teacher'
    # 'prediction': compare what the two predict; 'step': where it takes the sampler next;
    # 'balanced': between the two
    target: Literal['prediction', 'step', 'balanced'] = 'balanced'
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    schedule: Literal['linear', 'cosine'] = 'cosine'  # decay of the learning rates to zero
    checkpoint_every: int = 200  # optimizer steps between checkpoints
    log_every: int = 20  # optimizer steps between lines of metrics.jsonl
    max_to_keep: int = 2  # checkpoints kept; older ones are deleted

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 0, 'num_iterations')
        _check_at_least(self, 1, 'batch_size', 'checkpoint_every', 'log_every', 'max_to_keep')
        _check(
            self.sampler.variance != 'learned_range',
            "finetune.sampler.variance='learned_range': the predictions compared are those of eps "
            "or v alone; use name='ddim', or a fixed variance.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Fine-tuning on images of one's own with the denoising loss, after all other learning."""

    num_iterations: int = 0  # optimizer steps; 0: none
    # an .npz, a folder of images or of one subfolder per class, or tfds:NAME; 'teacher': drawn from
    # the teacher itself by the run's sampler (a folder of that name is './teacher')
    images: str = ''
    num_images: int = 256  # drawn where images='teacher', evenly of all classes
    label: int = 0  # class of images without labels, for a teacher that has classes
    label_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    batch_size: int = 16  # images per optimizer step, each at a timestep of its own
    # regular expression over module paths: what is computed in them is computed again in the
    # backward pass, less memory for more time; '': nothing is
    remat: str = r'(.*/)?(block|attention)_\d+'
    checkpoint_every: int = 200  # optimizer steps between checkpoints
    log_every: int = 20  # optimizer steps between lines of metrics.jsonl

    def __post_init__(self):
        _check_at_least(self, 0, 'num_iterations', 'label')
        _check_at_least(self, 1, 'batch_size', 'checkpoint_every', 'log_every', 'num_images')
        _check(0 <= self.label_dropout < 1, f'label_dropout={self.label_dropout}: expected 0..1.')
        _check(
            self.num_iterations == 0 or bool(self.images),
            "images='' with num_iterations > 0: expected an .npz, a folder, tfds:NAME or "
            "'teacher'.",
        )
        try:
            re.compile(self.remat)
        except re.error as error:
            text = f'remat={self.remat!r}: not a regular expression ({error}).'
            raise ValueError(text) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """One quantized network of a run."""

    method: MethodConfig = RoundToNearestConfig()
    quant: QuantConfig = QuantConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    adapt: AdaptConfig = AdaptConfig()
    title: str = ''  # in the table of a comparison; '': what the method is called

    def __post_init__(self):
        for name in ('reconstruct', 'finetune', 'adapt'):
            num_iterations, lack = getattr(self, name).num_iterations, why_not(name, self.method)
            _check(
                num_iterations == 0 or lack is None,
                f'{name}.num_iterations={num_iterations}: the method {self.method.name!r} {lack}; '
                f'set it to 0 or choose another method.',
            )
        is_float = self.quant.weight_bits == self.quant.activation_bits == FLOAT_BITS
        _check(
            not is_float or bool(self.quant.rules) or isinstance(self.method, FullFinetuningConfig),
            f'quant.weight_bits=32 and activation_bits=32: the method {self.method.name!r} has '
            f"nothing to quantize; choose fewer bits, or the method 'full_finetuning'.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The images drawn from every network for evaluation."""

    num_images: int = 1000  # images per network
    batch_size: int = 100  # images per network call; does not change the images
    mode: Literal['integer', 'fake'] = 'integer'  # multiply integers, or simulate in float
    # a text file, one prompt a line, of a text-conditional teacher: image i has prompt i, and
    # again from the first; calibration and fine-tuning take the same ones
    prompts: str | None = None

    def __post_init__(self):
        _check_choices(self)
        _check_at_least(self, 1, 'num_images', 'batch_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the images are compared with, and in which feature space."""

    # 'bundled', a classifier that train_teacher wrote, or 'inception': ADM's FID and its kin
    features: str = 'bundled'
    # bundled statistics or an .npz; for 'inception' whatever dmq_jax.evaluate takes as REF
    reference: str = 'fashion_mnist'
    # weights of 'inception'; '': the file that DMQ_INCEPTION_WEIGHTS names
    inception_weights: str = ''
    batch_size: int = 32  # images per call of the network of 'inception'

    def __post_init__(self):
        for name in ('features', 'reference'):
            _check(bool(getattr(self, name)), f"{name}='': expected a bundled name or a file.")
        _check_at_least(self, 1, 'batch_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The pictures of the report."""

    grid_size: int = 8  # rows and columns of an image grid
    layers: tuple[str, ...] = ()  # paths whose scales are plotted over t; (): a few are chosen

    def __post_init__(self):
        _check_at_least(self, 1, 'grid_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of a run."""

    # batches have data * fsdp parts, and the product of the three is the number of devices used;
    # one may be -1: all the devices that the others leave
    data: int = -1
    fsdp: int = 1  # parts of weights and optimizer state as well: less memory, more traffic
    tensor: int = 1  # parts of the output channels of weights

    def __post_init__(self):
        for name in ('data', 'fsdp', 'tensor'):
            size = getattr(self, name)
            _check(
                size == -1 or size >= 1,
                f'{name}={size}: expected a number of devices, or -1 for all that are left.',
            )
        _check(
            (self.data, self.fsdp, self.tensor).count(-1) <= 1,
            f'data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: only one may be -1; set '
            f'the others to numbers of devices.',
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run: one teacher, any number of students, the same samples and metrics for all."""

    seed: int = 0  # root of every random number
    teacher: TeacherConfig = TeacherConfig()
    sampler: SamplerConfig = SamplerConfig()  # draws the evaluated images
    calibrate: CalibrateConfig = CalibrateConfig()
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)  # name: student
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check(
            0 <= self.seed < 2**32, f'seed={self.seed}: expected 0..2^32-1 (a 32-bit random seed).'
        )
        for name in self.students:
            _check(
                name.isidentifier() and name != 'teacher',
                f"students has the name {name!r}: expected letters, digits and '_' (it names "
                f"folders and command line options), and not 'teacher'.",
            )


def from_config_dict(mapping: Any, schema: type[T] = Config) -> T:
    """The dataclass tree of a ConfigDict or a nested dict; missing fields take their defaults.

    Args:
      mapping: an `ml_collections.ConfigDict`, or nested dicts such as those of `to_dict`. Values
        that already are dataclasses of the right type are taken as they are.
      schema: the dataclass to build.

    Raises:
      ValueError: an unknown name (with the nearest known one), a wrong type, a value out of its
        range; the text says where.
    """
    return _convert(mapping, schema, 'config')


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts and tuples of plain values; `from_config_dict` of it, or of its JSON, is equal.

    Args:
      config: a dataclass of this module.
    """
    return dataclasses.asdict(config)


# Methods with options that were measured to be good together, by name; see README, "Results".
RECIPES: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        # What EfficientDM's integers cannot hold at low widths goes through SVDQuant's thin branch.
        'best': {'name': 'efficientdm', 'branch_rank': 8},
    }
)


def method_options(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """The options that stand for a method.

    Args:
      method: the name of a method or of one of `RECIPES`, or a dict of options that includes
        `name`.
    """
    return dict(RECIPES.get(method, {'name': method}) if isinstance(method, str) else method)


# What a stage needs to be worth its minutes on the bundled teacher; the papers' iterations are ten
# to fifty times as many.
_QUICK: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        'reconstruct': {'num_iterations': 500, 'num_timesteps': 10, 'num_images': 64},
        'finetune': {'num_iterations': 300},
        'adapt': {'num_iterations': 400},
    }
)
# The papers' rate is for 20,000 iterations.
_QUICK_ROUNDING = 2e-2
# What a paper asks of a stage besides.
_ASKED = {('tcaq_dm', 'reconstruct'): {'num_rounds': 2}}


def quick(method: str) -> dict[str, dict[str, Any]]:
    """Options with which a method learns in minutes: `student(**quick('qdiffusion'))`.

    Those of the method, and of the stage by which it learns (`LEARNS_BY`), if it does. A stage that
    learns from images needs `images` besides.

    Args:
      method: the name of a method, or of one of `RECIPES`.
    """
    options = method_options(method)
    name = options['name']
    stage = LEARNS_BY.get(name)
    if stage == 'reconstruct':
        options = {'learning': {'rounding_learning_rate': _QUICK_ROUNDING}} | options
    return {'method': options} | ({stage: quick_stage(stage, name)} if stage else {})


def quick_stage(stage: str, method: str) -> dict[str, Any]:
    """The options of one stage in `quick`, for the method of this name."""
    return {**_QUICK[stage], **_ASKED.get((method, stage), {})}


def base(schema: type = Config):
    """The defaults as an `ml_collections.ConfigDict`: what `get_config()` starts from.

    Every field is present, so that every `--config.a.b=value` works; a field that may be None is
    a placeholder of its type.

    Args:
      schema: the dataclass whose defaults are wanted.
    """
    return _config_dict(schema())


def student(method: str | Mapping[str, Any] = 'round_to_nearest', **overrides: Any):
    """A complete `config.students[...]` subtree, as an `ml_collections.ConfigDict`.

    Args:
      method: as of `method_options`.
      **overrides: options of StudentConfig, nested: `quant={'weight_bits': 8}`.

    Raises:
      ValueError: as `from_config_dict`.
    """
    options = {'method': method_options(method), **overrides}
    return _config_dict(_convert(options, StudentConfig, 'config.students.*'))


def compared(*, num_iterations: int, **quant: Any) -> dict[str, Any]:
    """Students that tell what learning brings: rounding, static and per timestep, and EfficientDM.

    Args:
      num_iterations: optimizer steps of EfficientDM.
      **quant: options of QuantConfig that all of them share.

    Raises:
      ValueError: as `from_config_dict`.
    """
    return {
        'rtn_static': student(quant=quant | {'per_timestep': False}),
        'rtn': student(quant=quant),
        'efficientdm': student(
            'efficientdm', quant=quant, finetune={'num_iterations': num_iterations}
        ),
    }


def at_widths(widths: str, *, num_iterations: int, **options: Any) -> dict[str, Any]:
    """EfficientDM at widths such as 'w4a8', by that name; no student at all for ''.

    Args:
      widths: bits of weights and activations; the argument of a config file.
      num_iterations: optimizer steps.
      **options: more of FinetuneConfig.

    Raises:
      ValueError: other widths; see also `from_config_dict`.
    """
    if not widths:
        return {}
    match = re.fullmatch(r'w(\d+)a(\d+)', widths)
    _check(match is not None, f"argument {widths!r} of the config file: expected e.g. 'w4a8'.")
    bits = {'weight_bits': int(match[1]), 'activation_bits': int(match[2])}
    finetune = {'num_iterations': num_iterations, **options}
    return {widths: student('efficientdm', quant=bits, finetune=finetune)}


def with_sampler(config: Any, **options: Any) -> Any:
    """Sets options of every sampler of a run: of its images, its calibration, and all learning.

    Samplers are separate options, because training steps may differ from sampling steps; most runs
    want them alike.

    Args:
      config: from `base()`, its students complete.
      **options: fields of SamplerConfig.

    Returns:
      The same `config`.

    Raises:
      ValueError: as `from_config_dict`.
    """
    samplers = [config.sampler, config.calibrate.sampler]
    for student_config in config.students.values():
        samplers += [student_config.finetune.sampler, student_config.reconstruct.sampler]
    for sampler in samplers:
        _convert(_items(sampler, 'sampler', 'a dict') | options, SamplerConfig, 'sampler')
        sampler.update(options)
    return config


def published(
    widths: str,
    *,
    path: str,
    sampler: Mapping[str, Any],
    student_sampler: Mapping[str, Any],
    num_iterations: int,
    batch_size: int,
    calibrate_batch_size: int = 16,
    num_images: int = 50_000,
    **teacher: Any,
):
    """What the protocols of published networks share, as an `ml_collections.ConfigDict`.

    Calibration and fine-tuning draw alike; images are judged by Inception's features.

    Args:
      widths: of a student, or ''; see `at_widths`.
      path: of the teacher.
      sampler: options of SamplerConfig for the images.
      student_sampler: those for calibration and fine-tuning.
      num_iterations: of fine-tuning.
      batch_size: images drawn at once.
      calibrate_batch_size: images observed at once.
      num_images: how many are drawn.
      **teacher: more of TeacherConfig.

    Raises:
      ValueError: as `at_widths`.
    """
    config = base()
    config.teacher.update({'path': path, **teacher})
    config.sampler.update(sampler)
    config.calibrate.sampler.update(student_sampler)
    config.calibrate.batch_size = calibrate_batch_size
    config.sample.update({'num_images': num_images, 'batch_size': batch_size})
    config.evaluate.features = 'inception'
    config.students = at_widths(widths, num_iterations=num_iterations, sampler=student_sampler)
    return config


def describe(config: Any) -> str:
    """The resolved `config` as indented JSON, for people and for config.json."""
    return json.dumps(to_dict(config), indent=2)


def _fail(path: str, value: Any, expected: str) -> typing.NoReturn:
    raise ValueError(
        f'{path}={value!r}: expected {expected}, got {type(value).__name__}; '
        f'correct it in the config file or with --{path}=... on the command line.'
    )


def _items(value: Any, path: str, expected: str) -> dict[str, Any]:
    """The entries of a dict or a ConfigDict, with placeholders resolved."""
    if hasattr(value, 'to_dict'):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        _fail(path, value, expected)
    return dict(value)


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(value, hint, path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, path)
    if origin is dict:
        entries = _items(value, path, 'a dict')
        return {name: _convert(v, arguments[1], f'{path}.{name}') for name, v in entries.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            _fail(path, value, 'a list or a tuple')
        return tuple(_convert(v, arguments[0], f'{path}[{i}]') for i, v in enumerate(value))
    if origin is Literal:
        value = _convert(value, type(arguments[0]), path)
        _check_choice(path, value, hint)
        return value
    # bool is a subclass of int; as a number it is nearly always a slip.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        _fail(path, value, hint.__name__)
    return value


def _convert_union(value: Any, options: Sequence[Any], path: str) -> Any:
    """An optional value, or the dataclass among `options` whose default `name` is value.name."""
    if types.NoneType in options:
        (hint,) = (option for option in options if option is not types.NoneType)
        return None if value is None else _convert(value, hint, path)
    if isinstance(value, tuple(options)):
        return value
    schemas = {option.__dataclass_fields__['name'].default: option for option in options}
    name = _items(value, path, 'a dict').get('name')
    if name not in schemas:
        near = _nearest(name, list(schemas)) if isinstance(name, str) else ''
        raise ValueError(f'{path}.name={name!r}: expected one of {", ".join(schemas)}{near or "."}')
    return _build(value, schemas[name], path)


def _build(value: Any, schema: type, path: str) -> Any:
    hints = _hints(schema)
    entries = _items(value, path, f'the options of {schema.__name__}')
    for name in entries:
        if name not in hints:
            near = _nearest(name, list(hints)) or f'; it has {", ".join(hints)}.'
            raise ValueError(f'{schema.__name__} has no field {name!r}{near} (at {path})')
    missing = [
        field.name
        for field in dataclasses.fields(schema)
        if field.name not in entries
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    _check(not missing, f'{path} lacks {", ".join(missing)}: {schema.__name__} has no default.')
    fields = {name: _convert(v, hints[name], f'{path}.{name}') for name, v in entries.items()}
    try:
        return schema(**fields)
    except ValueError as error:
        raise ValueError(f'{path}.{error}') from None


def _config_dict(config: Any):
    """A dataclass as a ConfigDict whose None fields know their type."""
    import ml_collections
    from ml_collections import config_dict

    result = ml_collections.ConfigDict()
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = _config_dict(value)
        elif isinstance(value, dict):
            entries = {key: _config_dict(entry) for key, entry in value.items()}
            value = ml_collections.ConfigDict(entries)
        elif types.NoneType in typing.get_args(hint):
            (kind,) = set(typing.get_args(hint)) - {types.NoneType}
            value = config_dict.FieldReference(value, field_type=kind)
        result[name] = value
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Labelled images: an `.npz`, a folder with one subfolder per class, or a TFDS name."""

    # an .npz with {train,test}_{images,labels}, a folder, or 'tfds:NAME'
    path: str = 'data/fashion_mnist.npz'
    image_size: int = 32  # smaller images are padded with zeros on every side
    num_classes: int = 10  # labels are 0..num_classes-1

    def __post_init__(self):
        _check(bool(self.path), "path='': expected an .npz, a folder or tfds:NAME.")
        _check_at_least(self, 1, 'image_size', 'num_classes')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The teacher's U-Net (`models/ddpm_unet.py`)."""

    channels: tuple[int, ...] = (32, 64, 96)  # width of each level, finest first
    layers_per_block: int = 1  # residual blocks per level on the way down
    attention: tuple[bool, ...] = (False, True, False)  # levels with attention
    head_dim: int | None = 32  # channels of one attention head; None: a single head
    num_groups: int = 8  # groups of every GroupNorm
    patch_size: int = 2  # pixels folded into channels along each side before the first layer

    def __post_init__(self):
        _check_at_least(self, 1, 'layers_per_block', 'num_groups', 'patch_size')
        _check(
            len(self.attention) == len(self.channels),
            f'attention={self.attention}: expected one entry for each of {self.channels}.',
        )
        for width in self.channels:
            _check(
                width % self.num_groups == 0,
                f'channels={self.channels}: expected multiples of num_groups={self.num_groups}.',
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The small classifier whose features and accuracy judge the samples."""

    num_epochs: int = 10  # passes over the training images
    batch_size: int = 64  # images per optimizer step
    learning_rate: float = 3e-3  # peak of the cosine schedule

    def __post_init__(self):
        _check_at_least(self, 1, 'num_epochs', 'batch_size')
        _check_at_least(self, 0, 'learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTeacherConfig:
    """Training of a small class-conditional float teacher, and of its classifier."""

    name: str = 'fashion_mnist'  # stem of the files written
    seed: int = 0  # root of every random number
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    schedule: Literal['linear', 'cosine', 'scaled_linear'] = 'linear'  # noise schedule
    prediction: Literal['eps', 'v'] = 'eps'  # what the network predicts
    num_iterations: int = 7_500  # optimizer steps
    batch_size: int = 64  # images per optimizer step
    learning_rate: float = 8e-4  # peak; cosine decay to 1 % after the warm-up
    warmup_iterations: int = 500  # steps from 0 to the peak
    ema_decay: float = 0.999  # of the averaged weights that are kept
    label_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the computation; weights are float32
    log_every: int = 50  # steps between lines of metrics.jsonl
    checkpoint_every: int = 250  # steps between checkpoints
    preview_every: int = 2000  # steps between grids of samples
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check_choices(self)
        positive = 'num_iterations', 'batch_size', 'log_every', 'checkpoint_every', 'preview_every'
        _check_at_least(self, 1, *positive)
        _check_at_least(self, 0, 'learning_rate', 'warmup_iterations')
        _check(0 <= self.ema_decay < 1, f'ema_decay={self.ema_decay}: expected 0..1 (below 1).')
        _check(0 <= self.label_dropout < 1, f'label_dropout={self.label_dropout}: expected 0..1.')
