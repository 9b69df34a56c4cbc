"""CIFAR-10, 32 x 32, unconditional: the network of DDPM and DDIM.

    python -m dmq_jax.main --config=configs/ddim_cifar10.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/ddim_cifar10

PATH: a checkpoint of the DDIM code (`model-790000.ckpt`, `ckpt.pth`), or the folder of
google/ddpm-cifar10-32 of diffusers.

Protocol of the papers: DDIM, 100 steps, quadratic spacing, eta 0; 50,000 images. Where several of
the 100 fall on one t, it is visited once: 96 visits.
Float, reported: FID 4.14 (TCAQ-DM), FID 4.53 and IS 9.00 (TuneQDM), FID 5.54 and IS 8.90
(BinaryDM); protocols differ.
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/ddim_cifar10.ckpt',
        sampler={'num_steps': 100, 'spacing': 'quadratic'},
        student_sampler={'num_steps': 100, 'spacing': 'quadratic'},
        num_iterations=64_000,
        batch_size=100,
    )
