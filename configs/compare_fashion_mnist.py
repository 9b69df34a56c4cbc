"""All methods on the bundled Fashion-MNIST teacher, same seeds, same calibration, same evaluator.

    CONFIG=configs/compare_fashion_mnist.py            # or :full
    python -m dmq_jax.compare --config=$CONFIG --workdir=runs/compare --workers=4

`reduced`, the default: W4A8 with coverage `full` and W4A4 with `paper`, 500 images. `full`: W8A8,
W4A8, W4A4, W2A8 with both coverages, 1,000 images. A network of this size is made quickest on one
core, several at a time. All that learns does so for about a minute of one core: how methods compare
on a small budget, not what each reaches in the end. What learns from a user's images, PEQA, TuneQDM
and QLoRA, learns from images of the teacher here, so that no data is needed.
"""

from dmq_jax.config import base, student, with_sampler

_OPTIONS = 'reconstruct', 'finetune', 'adapt', 'title'
SETTINGS = {
    'reduced': ('w4a8_full', 'w4a4_paper'),
    'full': tuple(
        f'{bits}_{coverage}'
        for bits in ('w8a8', 'w4a8', 'w4a4', 'w2a8')
        for coverage in ('paper', 'full')
    ),
}


def cells():
    """The methods, by name: their options, and how long they learn."""
    blocks = {'num_iterations': 100, 'num_timesteps': 10, 'num_images': 64}
    tuned = {'num_iterations': 150}
    adapt = {'num_iterations': 150}
    return {
        'rtn_static': {'quant': {'per_timestep': False}},
        'rtn': {},
        'repq_vit': {'method': 'repq_vit'},
        'svdquant': {'method': 'svdquant'},
        'qdiffusion': {
            'method': 'qdiffusion', 'reconstruct': blocks,
            'quant': {'per_timestep': False, 'split_shortcuts': True},
        },
        'tfmq_dm': {'method': 'tfmq_dm', 'reconstruct': blocks},
        'ptqd': {'method': 'ptqd', 'reconstruct': blocks},
        'tcaq_dm': {
            'method': 'tcaq_dm',
            'reconstruct': blocks | {'num_rounds': 2}, 'quant': {'per_timestep': False},
        },
        'efficientdm': {'method': 'efficientdm', 'finetune': tuned},
        'efficientdm_factors': {
            'method': {'name': 'efficientdm', 'channels': {'strength': 0.5}}, 'finetune': tuned,
            'title': 'EfficientDM, channel factors',
        },
        'best': {
            'method': 'best', 'finetune': tuned, 'title': 'best: EfficientDM, branch',
        },
        'lsq': {'method': 'lsq', 'finetune': tuned},
        'peqa': {
            'method': {'name': 'tuneqdm', 'scales': 'output', 'num_experts': 1}, 'adapt': adapt,
            'title': 'PEQA',
        },
        'tuneqdm': {'method': 'tuneqdm', 'adapt': adapt},
        'qlora': {'method': 'qlora', 'adapt': adapt},
    }  # fmt: skip


def get_config(size: str = 'reduced'):
    """Options of the comparison; all defaults are in `dmq_jax.config`."""
    if size not in SETTINGS:
        raise ValueError(f'{size!r}: expected one of {", ".join(SETTINGS)} after the file name.')
    config = base()
    config.data.update({'path': 'teacher', 'num_images': 256})
    if size == 'reduced':
        config.sample.num_images = 500
    students = {}
    for setting in SETTINGS[size]:
        bits, coverage = setting.split('_')
        widths = {'weight_bits': int(bits[1]), 'activation_bits': int(bits[3])}
        for name, options in cells().items():
            quant = widths | {'coverage': coverage} | options.get('quant', {})
            rest = {key: options[key] for key in _OPTIONS if key in options}
            students[f'{name}_{setting}'] = student(
                options.get('method', 'round_to_nearest'), quant=quant, **rest
            )
    config.students = students
    return with_sampler(config, eta=1.0)
