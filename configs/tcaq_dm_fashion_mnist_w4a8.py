"""Fashion-MNIST at W4A8: TCAQ-DM, and what each of its three parts brings.

    CONFIG=configs/tcaq_dm_fashion_mnist_w4a8.py
    python -m dmq_jax.main --config=$CONFIG --workdir=runs/tcaq_dm

Every layer is quantized. 500 iterations per block in the first round and 250 in the second, in
place of the paper's 20,000 and 10,000, and rates that fit them.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    quant = {
        'weight_bits': 4, 'activation_bits': 8, 'coverage': 'full', 'per_timestep': False,
        'softmax_bits': 8,
    }  # fmt: skip
    reconstruct = {
        'num_iterations': 500, 'batch_size': 16, 'num_timesteps': 10, 'num_images': 64,
        'num_rounds': 2,
    }  # fmt: skip
    method = {'name': 'tcaq_dm'}
    config = base()
    config.students = {
        'tcaq_dm': student(method, quant=quant, reconstruct=reconstruct),
        'no_factors': student(
            method | {'channels': {'strength': 0.0}}, quant=quant, reconstruct=reconstruct
        ),
        'even_softmax': student(
            method | {'softmax': {'choice': 'uniform'}}, quant=quant, reconstruct=reconstruct
        ),
        'one_round': student(method, quant=quant, reconstruct=reconstruct | {'num_rounds': 1}),
    }
    return with_sampler(config, eta=1.0)
