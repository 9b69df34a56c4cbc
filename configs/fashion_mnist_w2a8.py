"""Fashion-MNIST at W2A8: round to nearest against EfficientDM, 3000 iterations.

python -m dmq_jax.main --config=configs/fashion_mnist_w2a8.py --workdir=runs/fashion_mnist_w2a8
"""

from dmq_jax.config import base, student


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    bits = {'weight_bits': 2, 'activation_bits': 8}
    config = base()
    config.students = {
        'rtn_static': student(quant=bits | {'per_timestep': False}),
        'rtn': student(quant=bits),
        'efficientdm': student('efficientdm', quant=bits, finetune={'num_iterations': 3000}),
    }
    return config
