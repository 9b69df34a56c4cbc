"""Options of the float network, of samplers, and of the calibration that draws with them."""

import dataclasses
import math
from typing import Literal

from dmq_jax.config.checks import check, check_at_least, check_choices


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
        check_choices(self)
        check(bool(self.path), "path='': expected a bundled name, a file or a folder.")
        if self.num_classes is not None:
            check_at_least(self, 1, 'num_classes')


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
        check_choices(self)
        check_at_least(self, 1, 'num_steps')
        check_at_least(self, 0, 'guidance_scale')
        check(0 <= self.eta <= 1, f'eta={self.eta}: expected 0..1.')
        check(
            self.eta == 0 or self.name == 'ddim',
            f'eta={self.eta} with name={self.name!r}: only ddim has an eta; set eta=0.0.',
        )
        fewest = {'plms': 2, 'pndm': 4}.get(self.name, 1)
        check(
            self.num_steps >= fewest,
            f'num_steps={self.num_steps} with name={self.name!r}: expected at least {fewest}.',
        )
        check_at_least(self, 0, 'steps_offset')
        check(
            self.steps_offset == 0 or self.spacing in ('leading', 'dpm_leading'),
            f'steps_offset={self.steps_offset} with spacing={self.spacing!r}: only leading and '
            f'dpm_leading have an offset; set steps_offset=0.',
        )
        is_divided = self.spacing == 'adm' and sum(self.sections) == self.num_steps
        check(
            not self.sections or (is_divided and min(self.sections) >= 1),
            f'sections={self.sections} with spacing={self.spacing!r}: expected (), or '
            f"spacing='adm' and positive numbers of sum num_steps={self.num_steps}.",
        )
        check(
            self.spacing != 'karras' or self.name in ('dpm_solver', 'euler'),
            f"spacing='karras' with name={self.name!r}: only dpm_solver and euler go by the level "
            f'of noise; choose another spacing.',
        )
        check(
            self.variance == 'fixed_small' or self.name == 'ddpm',
            f'variance={self.variance!r} with name={self.name!r}: only ddpm has a choice; set '
            f"variance='fixed_small'.",
        )
        check(
            self.clip_sample is None or 0 < self.clip_sample < math.inf,
            f'clip_sample={self.clip_sample}: expected None or a number above 0.',
        )
        check(
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
        check_at_least(self, 1, 'num_images', 'batch_size', 'values_per_tensor')
        # A last partial batch would be a second program, and count less than its images.
        check(
            self.num_images <= self.batch_size or self.num_images % self.batch_size == 0,
            f'num_images={self.num_images}: expected a multiple of batch_size={self.batch_size}, '
            f'or less than it.',
        )
