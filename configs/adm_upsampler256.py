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

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/64_256_upsampler.pt',
        low_res='runs/adm_imagenet64/samples/teacher/images.npz',
        sampler={
            'name': 'ddpm', 'num_steps': 250, 'spacing': 'adm', 'variance': 'learned_range',
            'clip_sample': 1.0,
        },
        student_sampler={'num_steps': 100, 'spacing': 'adm_ddim', 'clip_sample': 1.0},
        num_iterations=16_000,
        batch_size=8,
        calibrate_batch_size=4,
    )  # fmt: skip
