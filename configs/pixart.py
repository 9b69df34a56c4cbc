"""PixArt, 1024 x 1024, from texts.

    python -m dmq_jax.main --config=configs/pixart.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/pixart

PATH: the folder of PixArt-alpha or PixArt-Sigma of diffusers. One prompt a line in a file:
--config.sample.prompts=FILE. Parameters, those of the text encoder too, are kept in bfloat16.

Protocol: DPM-Solver++, 20 steps, guidance 4.5. EfficientDM has no run of it; numbers in float with
these prompts: not stated.
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/PixArt-Sigma-XL-2-1024-MS',
        dtype='bfloat16',
        sampler={
            'name': 'dpm_solver', 'num_steps': 20, 'guidance_scale': 4.5, 'spacing': 'linspace',
        },
        student_sampler={'num_steps': 20, 'guidance_scale': 4.5},
        num_iterations=16_000,
        batch_size=1,
        calibrate_batch_size=1,
        num_images=1_000,
    )  # fmt: skip
