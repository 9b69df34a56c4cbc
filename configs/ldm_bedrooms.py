"""LSUN bedrooms, 256 x 256, unconditional: LDM-4.

    python -m dmq_jax.main --config=configs/ldm_bedrooms.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/ldm_bedrooms

PATH: `model.ckpt` of lsun_beds256 of CompVis.

Protocol of the papers: DDIM, 200 steps, eta 1 (EfficientDM fine-tunes at 100); 50,000 images.
Float, reported: FID 2.9 to 3.1; FID 3.03, sFID 7.03 (survey).
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/lsun_bedrooms.ckpt',
        sampler={'num_steps': 200, 'eta': 1.0, 'final_alpha': 'first'},
        student_sampler={'num_steps': 100, 'eta': 1.0, 'final_alpha': 'first'},
        num_iterations=32_000,
        batch_size=50,
    )
