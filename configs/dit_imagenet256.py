"""ImageNet, 256 x 256, class-conditional: DiT-XL/2.

    python -m dmq_jax.main --config=configs/dit_imagenet256.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/dit_imagenet256

PATH: the folder of facebook/DiT-XL-2-256 of diffusers; or `DiT-XL-2-256x256.pt` of the original,
with a folder that holds its autoencoder in vae/ as --config.teacher.components.

Protocol of the papers: DDPM with the learnt variance, 100 steps, guidance 1.5; 50,000 images.
Float, reported: FID 5.31, sFID 17.61, IS 245.85 (Q-DiT, 100 steps).
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/DiT-XL-2-256',
        sampler={
            'name': 'ddpm', 'num_steps': 100, 'spacing': 'adm', 'variance': 'learned_range',
            'guidance_scale': 1.5,
        },
        student_sampler={'num_steps': 100, 'guidance_scale': 1.5},
        num_iterations=16_000,
        batch_size=25,
    )  # fmt: skip
