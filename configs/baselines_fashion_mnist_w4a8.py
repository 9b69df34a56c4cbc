"""Fashion-MNIST at W4A8: what the papers are measured against, one student of each.

    CONFIG=configs/baselines_fashion_mnist_w4a8.py
    python -m dmq_jax.main --config=$CONFIG --workdir=runs/baselines

PTQD and TFMQ-DM learn block by block, LSQ trains every weight, RepQ-ViT and SVDQuant only
calibrate. Iterations are a few hundred in place of the papers' thousands, and rates that fit them.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    quant = {'weight_bits': 4, 'activation_bits': 8, 'coverage': 'full', 'softmax_bits': 8}
    reconstruct = {'num_iterations': 500, 'num_timesteps': 10, 'num_images': 64}
    config = base()
    config.students = {
        'rtn': student(quant=quant),
        'repq_vit': student('repq_vit', quant=quant),
        'svdquant': student('svdquant', quant=quant),
        'ptqd': student('ptqd', quant=quant, reconstruct=reconstruct),
        'tfmq_dm': student('tfmq_dm', quant=quant, reconstruct=reconstruct),
        'lsq': student('lsq', quant=quant, finetune={'num_iterations': 1000}),
    }
    return with_sampler(config, eta=1.0)
