"""Fashion-MNIST at W2A8: round to nearest against EfficientDM, 3000 iterations.

    python -m dmq_jax.main --config=configs/fashion_mnist_w2a8.py --workdir=runs/fashion_mnist_w2a8

Coverage, calibration and samples as in `configs/quickstart.py`; `best_full` exempts no layer from
quantization, and adds a thin branch in 16 bits.
"""

from dmq_jax.config import base, compared, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    bits = {'weight_bits': 2, 'activation_bits': 8}
    config = base()
    config.students = compared(num_iterations=3000, **bits)
    config.students['best_full'] = student(
        'best', quant=bits | {'coverage': 'full'}, finetune={'num_iterations': 2000}
    )
    return with_sampler(config, eta=1.0)
