"""PixArt, 1024 x 1024, from texts.

    python -m dmq_jax.main --config=configs/pixart.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/pixart

PATH: the folder of PixArt-alpha or PixArt-Sigma of diffusers. One prompt a line in a file:
--config.sample.prompts=FILE. Parameters, those of the text encoder too, are kept in bfloat16.

Protocol: DPM-Solver++, 20 steps, guidance 4.5. EfficientDM has no run of it; numbers in float with
these prompts: not stated.
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/PixArt-Sigma-XL-2-1024-MS'
    config.teacher.dtype = 'bfloat16'
    config.sampler.name = 'dpm_solver'
    config.sampler.num_steps = 20
    config.sampler.guidance_scale = 4.5
    config.sampler.spacing = 'linspace'
    config.calibrate.sampler.num_steps = 20
    config.calibrate.sampler.guidance_scale = 4.5
    config.calibrate.batch_size = 1
    config.sample.num_images = 1_000
    config.sample.batch_size = 1
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths, num_iterations=16_000, sampler={'num_steps': 20, 'guidance_scale': 4.5}
    )
    return config
