"""LSUN churches, 256 x 256, unconditional: LDM-8.

    python -m dmq_jax.main --config=configs/ldm_churches.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/ldm_churches

PATH: `model.ckpt` of lsun_churches256 of CompVis.

Protocol of the papers: DDIM, 400 or 500 steps, eta 0; 50,000 images. T = 1000 is no multiple of
400, so the timesteps are those of latent diffusion's code at 500.
Float, reported: FID 4.0 to 4.8; FID 4.17, sFID 12.91 (survey).
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/lsun_churches.ckpt',
        sampler={'num_steps': 500, 'final_alpha': 'first'},
        student_sampler={'num_steps': 100, 'final_alpha': 'first'},
        num_iterations=16_000,
        batch_size=50,
    )
