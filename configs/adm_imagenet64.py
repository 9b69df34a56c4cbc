"""ImageNet, 64 x 64, class-conditional: ADM.

    python -m dmq_jax.main --config=configs/adm_imagenet64.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/adm_imagenet64

PATH: `64x64_diffusion.pt` of guided diffusion.

Protocol: the learnt variance, 250 steps spaced as ADM does, predicted images clipped, no guidance;
50,000 images. Float, reported: FID 2.07, sFID 4.29, precision 0.74, recall 0.63 (arXiv:2105.05233,
table 5, with dropout, as the published network has). EfficientDM has no run of this network.
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/64x64_diffusion.pt'
    config.sampler.name = 'ddpm'
    config.sampler.num_steps = 250
    config.sampler.spacing = 'adm'
    config.sampler.variance = 'learned_range'
    config.sampler.clip_sample = 1.0
    config.calibrate.sampler.num_steps = 100
    config.calibrate.sampler.spacing = 'adm_ddim'
    config.calibrate.sampler.clip_sample = 1.0
    config.calibrate.batch_size = 16
    config.sample.num_images = 50_000
    config.sample.batch_size = 50
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths,
        num_iterations=16_000,
        sampler={'num_steps': 100, 'spacing': 'adm_ddim', 'clip_sample': 1.0},
    )
    return config
