"""Fashion-MNIST at W4A8, tuned on images: PEQA, TuneQDM with 2 experts, QLoRA, and all in float.

    CONFIG=configs/tuneqdm_fashion_mnist_w4a8.py
    python -m dmq_jax.main --config=$CONFIG --config.data.path=FOLDER --workdir=runs/tuneqdm

FOLDER holds the user's images, in one subfolder per class or all of class `data.label`; it may be
an .npz as well, such as the one that `configs/prepare_fashion_mnist.py` writes (the default), or
`teacher`: images that the teacher draws. With few images of one thing the student forgets the
others; what keeps it from that, as DreamBooth's prior preservation does, is
`--config.data.class_path=teacher`, or a folder. Every layer is quantized, as in the paper, whose
activations stay in float: `--config.students.tuneqdm.quant.activation_bits=32`.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    quant = {'weight_bits': 4, 'activation_bits': 8, 'coverage': 'full'}
    adapt = {'num_iterations': 400}
    config = base()
    # Fashion-MNIST has 28 pixels a side, its teacher 32.
    config.data.update({'path': 'data/fashion_mnist.npz', 'fit': 'pad'})
    config.students = {
        'rtn': student(quant=quant),
        'peqa': student(
            {'name': 'tuneqdm', 'scales': 'output', 'num_experts': 1}, quant=quant, adapt=adapt
        ),
        'tuneqdm': student('tuneqdm', quant=quant, adapt=adapt),
        'qlora': student('qlora', quant=quant, adapt=adapt),
        'full': student(
            'full_finetuning', quant={'weight_bits': 32, 'activation_bits': 32}, adapt=adapt
        ),
    }
    return with_sampler(config, eta=1.0)
