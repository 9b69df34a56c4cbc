"""Fashion-MNIST at W4A8: round to nearest against Q-Diffusion, with and without its second pass.

    CONFIG=configs/qdiffusion_fashion_mnist_w4a8.py
    python -m dmq_jax.main --config=$CONFIG --workdir=runs/qdiffusion

Every layer is quantized, as in the paper, with one activation scale for all timesteps, and layers
fed with a skip are quantized in two parts. 500
iterations per block in place of the paper's 20,000.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    quant = {
        'weight_bits': 4, 'activation_bits': 8, 'coverage': 'full', 'per_timestep': False,
        'split_shortcuts': True,
    }  # fmt: skip
    reconstruct = {'num_iterations': 500, 'num_timesteps': 10, 'num_images': 64}
    config = base()
    config.students = {
        'rtn': student(quant=quant),
        'rounding': student(
            {'name': 'qdiffusion', 'learning': {'input_share': 0.0}},
            quant=quant, reconstruct=reconstruct,
        ),
        'qdiffusion': student('qdiffusion', quant=quant, reconstruct=reconstruct),
    }  # fmt: skip
    return with_sampler(config, eta=1.0)
