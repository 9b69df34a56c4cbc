"""ImageNet, 64 x 64, class-conditional: ADM.

    python -m dmq_jax.main --config=configs/adm_imagenet64.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/adm_imagenet64

PATH: `64x64_diffusion.pt` of guided diffusion.

Protocol: the learnt variance, 250 steps spaced as ADM does, predicted images clipped, no guidance;
50,000 images. Float, reported: FID 2.07, sFID 4.29, precision 0.74, recall 0.63 (arXiv:2105.05233,
table 5, with dropout, as the published network has). EfficientDM has no run of this network.
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/64x64_diffusion.pt',
        sampler={
            'name': 'ddpm', 'num_steps': 250, 'spacing': 'adm', 'variance': 'learned_range',
            'clip_sample': 1.0,
        },
        student_sampler={'num_steps': 100, 'spacing': 'adm_ddim', 'clip_sample': 1.0},
        num_iterations=16_000,
        batch_size=50,
    )  # fmt: skip
