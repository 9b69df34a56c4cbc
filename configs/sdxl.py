"""Stable Diffusion XL, 1024 x 1024, from texts.

    python -m dmq_jax.main --config=configs/sdxl.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/sdxl

PATH: the folder of SDXL base 1.0 of diffusers; or a single .safetensors of it, with a folder that
holds tokenizer/ and tokenizer_2/ as --config.teacher.components. One prompt a line in a file:
--config.sample.prompts=FILE. Parameters are kept in bfloat16: 5 GB.

Protocol: Euler, 50 steps, guidance 5.0. EfficientDM has no run of it; numbers in float: not stated.
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/stable-diffusion-xl-base-1.0'
    config.teacher.dtype = 'bfloat16'
    config.sampler.name = 'euler'
    config.sampler.num_steps = 50
    config.sampler.guidance_scale = 5.0
    config.sampler.spacing = 'leading'
    config.sampler.steps_offset = 1
    config.calibrate.sampler.num_steps = 50
    config.calibrate.sampler.guidance_scale = 5.0
    config.calibrate.sampler.final_alpha = 'first'
    config.calibrate.batch_size = 1
    config.sample.num_images = 1_000
    config.sample.batch_size = 1
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths,
        num_iterations=16_000,
        sampler={'num_steps': 50, 'guidance_scale': 5.0, 'final_alpha': 'first'},
    )
    return config
