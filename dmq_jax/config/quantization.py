"""Options of what becomes integers: bits, coverage, ranges."""

import dataclasses
from typing import Literal

from dmq_jax.config.checks import check, check_at_least, check_bits, check_choices, check_patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """The widths of the layers whose whole path matches a pattern; the first match wins."""

    pattern: str  # regular expression over paths like 'down_0/block_0/conv1'
    weight_bits: int | None = None  # 2..8, 32 for float; None: the student's `weight_bits`
    activation_bits: int | None = None  # 2..8, 32 for float; None: its `activation_bits`
    # contraction entries per scale, 0 for one scale per channel; None: its `weight_group_size`
    weight_group_size: int | None = None

    def __post_init__(self):
        check(bool(self.pattern), "pattern='': expected a regular expression; all layers: '.*'.")
        check_patterns(self, 'pattern')
        for name in ('weight_bits', 'activation_bits'):
            if getattr(self, name) is not None:
                check_bits(name, getattr(self, name))
        if self.weight_group_size is not None:
            check_at_least(self, 0, 'weight_group_size')


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
        check_choices(self)
        check_bits('weight_bits', self.weight_bits)
        check_bits('activation_bits', self.activation_bits)
        check(50 < self.percentile <= 100, f'percentile={self.percentile}: expected 50..100.')
        if self.softmax_bits is not None:
            valid = 2 <= self.softmax_bits <= 8 or self.softmax_bits == 16
            check(valid, f'softmax_bits={self.softmax_bits}: expected 2..8, 16, or None.')
        if self.weight_group_size is not None:
            check_at_least(self, 1, 'weight_group_size')
        check(
            self.coverage != 'rules' or bool(self.rules),
            "coverage='rules' with rules=(): list the rules, or use 'paper' or 'full'.",
        )
