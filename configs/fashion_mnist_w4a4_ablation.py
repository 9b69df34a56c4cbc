"""What each part of EfficientDM brings at W4A4, at 300 iterations each.

    python -m dmq_jax.main --config=configs/fashion_mnist_w4a4_ablation.py --workdir=runs/ablation

Each student up to `per_timestep`, the default, adds one part; the others change one part of it.
"""

from dmq_jax.config import base, student, with_sampler


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    static = {'per_timestep': False}
    plain = {'name': 'efficientdm', 'scale_aware': False}
    finetune = {'num_iterations': 300}
    config = base()
    config.students = {
        'rtn': student(quant=static),
        'low_rank': student(plain, quant=static, finetune=finetune),
        'scale_aware': student('efficientdm', quant=static, finetune=finetune),
        'per_timestep': student('efficientdm', finetune=finetune),
        'frozen_affine': student(
            {'name': 'efficientdm', 'affine_learning_rate': 0.0}, finetune=finetune
        ),
        'on_dequantized': student(
            {'name': 'efficientdm', 'base': 'dequantized'}, finetune=finetune
        ),
        'output_loss': student({'name': 'efficientdm', 'loss': 'output'}, finetune=finetune),
        'target_prediction': student('efficientdm', finetune=finetune | {'target': 'prediction'}),
        'target_step': student('efficientdm', finetune=finetune | {'target': 'step'}),
        'drawn_by_student': student('efficientdm', finetune=finetune | {'drawn_by': 'student'}),
        'one_trajectory': student('efficientdm', finetune=finetune | {'positions': 'trajectory'}),
        'hundred_steps': student(
            'efficientdm', finetune=finetune | {'sampler': {'num_steps': 100}}
        ),
    }
    return with_sampler(config, eta=1.0)
