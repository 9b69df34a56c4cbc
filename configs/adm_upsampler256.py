"""ImageNet, 64 x 64 to 256 x 256, class-conditional: ADM's upsampler.

    python -m dmq_jax.main --config=configs/adm_upsampler256.py --stages=teacher,sample
        --config.teacher.path=PATH --config.teacher.low_res=SMALL --workdir=runs/adm_upsampler256

PATH: `64_256_upsampler.pt` of guided diffusion. SMALL: an .npz with arr_0, uint8 [N, 64, 64, 3],
and arr_1, their classes, such as samples/teacher/images.npz of a run of adm_imagenet64.py.

Protocol: the learnt variance, 250 steps spaced as ADM does, predicted images clipped; as many
images as there are small ones, 50,000. All small images are held in memory as float32: 2.5 GB for
50,000. Float, reported: FID 3.94, sFID 6.14, precision 0.83, recall 0.53 for small images drawn
with classifier guidance (arXiv:2105.05233, table 5), which is not part of this project.
EfficientDM has no run of this network.
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/64_256_upsampler.pt'
    config.teacher.low_res = 'runs/adm_imagenet64/samples/teacher/images.npz'
    config.sampler.name = 'ddpm'
    config.sampler.num_steps = 250
    config.sampler.spacing = 'adm'
    config.sampler.variance = 'learned_range'
    config.sampler.clip_sample = 1.0
    config.calibrate.sampler.num_steps = 100
    config.calibrate.sampler.spacing = 'adm_ddim'
    config.calibrate.sampler.clip_sample = 1.0
    config.calibrate.batch_size = 4
    config.sample.num_images = 50_000
    config.sample.batch_size = 8
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths,
        num_iterations=16_000,
        sampler={'num_steps': 100, 'spacing': 'adm_ddim', 'clip_sample': 1.0},
    )
    return config
