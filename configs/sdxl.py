"""Stable Diffusion XL, 1024 x 1024, from texts.

    python -m dmq_jax.main --config=configs/sdxl.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/sdxl

PATH: the folder of SDXL base 1.0 of diffusers; or a single .safetensors of it, with a folder that
holds tokenizer/ and tokenizer_2/ as --config.teacher.components. One prompt a line in a file:
--config.sample.prompts=FILE. Parameters are kept in bfloat16: 5 GB.

Protocol: Euler, 50 steps, guidance 5.0. EfficientDM has no run of it; numbers in float: not stated.
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/stable-diffusion-xl-base-1.0',
        dtype='bfloat16',
        sampler={
            'name': 'euler', 'num_steps': 50, 'guidance_scale': 5.0, 'spacing': 'leading',
            'steps_offset': 1,
        },
        student_sampler={'num_steps': 50, 'guidance_scale': 5.0, 'final_alpha': 'first'},
        num_iterations=16_000,
        batch_size=1,
        calibrate_batch_size=1,
        num_images=1_000,
    )  # fmt: skip
