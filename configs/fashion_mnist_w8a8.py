"""Fashion-MNIST at W8A8: round to nearest against EfficientDM, 500 iterations.

    python -m dmq_jax.main --config=configs/fashion_mnist_w8a8.py --workdir=runs/fashion_mnist_w8a8

Coverage, calibration and samples as in `configs/quickstart.py`.
"""

from dmq_jax.config import base, compared, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    config = base()
    config.students = compared(num_iterations=500, weight_bits=8, activation_bits=8)
    return with_sampler(config, eta=1.0)
