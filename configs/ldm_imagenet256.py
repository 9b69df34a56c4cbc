"""ImageNet, 256 x 256, class-conditional: LDM-4 (cin256-v2), the main table of EfficientDM.

    python -m dmq_jax.main --config=configs/ldm_imagenet256.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/ldm_imagenet256

PATH: `model.ckpt` of cin256-v2 of CompVis.

Protocol of the papers: DDIM, 20 steps, eta 0, guidance 3.0; 50 images of every class, 50,000.
Float, reported: IS 364.73, FID 11.28, sFID 7.70. At this guidance the float model is over-guided,
and what restores diversity lowers FID, so compare sFID and precision too, and 250 steps at guidance
1.5 (--config.sampler.num_steps=250 --config.sampler.guidance_scale=1.5): eta 0 IS 205.55, FID 3.31,
sFID 5.10; eta 1 IS 249.59, FID 3.54, sFID 5.10 (CompVis/latent-diffusion, issue 262).
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/cin256-v2.ckpt',
        sampler={'num_steps': 20, 'guidance_scale': 3.0, 'final_alpha': 'first'},
        student_sampler={
            'num_steps': 100, 'eta': 1.0, 'guidance_scale': 1.5, 'final_alpha': 'first',
        },
        num_iterations=16_000,
        batch_size=50,
    )  # fmt: skip
