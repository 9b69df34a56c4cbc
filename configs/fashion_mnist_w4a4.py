"""Fashion-MNIST at W4A4: the long run, both coverages.

    python -m dmq_jax.main --config=configs/fashion_mnist_w4a4.py --workdir=runs/fashion_mnist_w4a4

About an hour on two cores. `paper` leaves first and last layers at 8 bits and shortcuts,
strided convolutions and attention products in float; `full` exempts nothing;
`best` adds a thin branch in 16 bits to it.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    full = {'coverage': 'full'}
    long = {'num_iterations': 4000}
    config = base()
    config.students = {
        'rtn_static': student(quant={'per_timestep': False}),
        'rtn': student(),
        'efficientdm': student('efficientdm', finetune=long),
        'rtn_full_static': student(quant=full | {'per_timestep': False}),
        'rtn_full': student(quant=full),
        'efficientdm_full': student('efficientdm', quant=full, finetune=long),
        'best_full': student('best', quant=full, finetune=long),
    }
    return with_sampler(config, eta=1.0)
