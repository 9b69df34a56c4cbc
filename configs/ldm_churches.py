"""LSUN churches, 256 x 256, unconditional: LDM-8.

    python -m dmq_jax.main --config=configs/ldm_churches.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/ldm_churches

PATH: `model.ckpt` of lsun_churches256 of CompVis.

Protocol of the papers: DDIM, 400 or 500 steps, eta 0; 50,000 images. T = 1000 is no multiple of
400, so the timesteps are those of latent diffusion's code at 500.
Float, reported: FID 4.0 to 4.8; FID 4.17, sFID 12.91 (survey).
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/lsun_churches.ckpt'
    config.sampler.num_steps = 500
    config.sampler.final_alpha = 'first'
    config.calibrate.sampler.num_steps = 100
    config.calibrate.sampler.final_alpha = 'first'
    config.calibrate.batch_size = 16
    config.sample.num_images = 50_000
    config.sample.batch_size = 50
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths, num_iterations=16_000, sampler={'num_steps': 100, 'final_alpha': 'first'}
    )
    return config
