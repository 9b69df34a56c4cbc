"""The first run: a 4-bit Fashion-MNIST model beside its float teacher, in minutes on a CPU.

    bash launch/quickstart.sh

or `python -m dmq_jax.main --config=configs/quickstart.py --workdir=runs/quickstart`.
Round to nearest with one activation scale for all timesteps, with one for each, and EfficientDM,
all W4A4 with the coverage of the paper, 20 DDIM steps. Expected numbers: README.md.
"""

from dmq_jax.config import base, compared, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    config = base()
    config.students = compared(num_iterations=300, weight_bits=4, activation_bits=4)
    return with_sampler(config, eta=1.0)
