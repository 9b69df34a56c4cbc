"""Fashion-MNIST at W8A8: round to nearest against EfficientDM, 500 iterations.

python -m dmq_jax.main --config=configs/fashion_mnist_w8a8.py --workdir=runs/fashion_mnist_w8a8
"""

from dmq_jax.config import base, student


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    bits = {'weight_bits': 8, 'activation_bits': 8}
    config = base()
    config.students = {
        'rtn_static': student(quant=bits | {'per_timestep': False}),
        'rtn': student(quant=bits),
        'efficientdm': student('efficientdm', quant=bits, finetune={'num_iterations': 500}),
    }
    return config
