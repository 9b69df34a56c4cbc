"""The bundled teacher: a class-conditional U-Net on Fashion-MNIST, and its classifier.

    python configs/prepare_fashion_mnist.py MOSAIC_FOLDER data/fashion_mnist.npz
    python -m dmq_jax.train_teacher --config=configs/teacher_fashion_mnist.py --workdir=runs/teacher

What to expect: dmq_jax/assets/README.md.
"""

from dmq_jax.config import TrainTeacherConfig, base


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config.TrainTeacherConfig`."""
    config = base(TrainTeacherConfig)
    config.num_iterations = 7_500
    config.dtype = 'bfloat16'  # twice as fast as float32 on CPUs with AVX512-BF16
    return config
