"""Stable Diffusion 1.5 at W4, taught one's own subject: TuneQDM with 2 experts, and PEQA.

    CONFIG=configs/tuneqdm_sd15.py
    python -m dmq_jax.main --config=$CONFIG --config.teacher.path=PATH --config.data.path=FOLDER
        --config.data.prompt='a photo of sks dog' --stages=finetune,export,sample --workdir=runs/dog

PATH is that of `configs/sd15.py`. FOLDER holds a few photographs of any size; what one of them
shows may stand beside it, in NAME.txt. The images that are drawn in the end are of
`data.prompt`, or of the prompts of a file, `--config.sample.prompts=FILE`. So that the other dogs
are not forgotten: `--config.data.class_path=teacher --config.data.class_prompt='a photo of a dog'`,
for which the teacher draws `data.num_images`, or a folder of them.

Protocol of the paper: 400 steps of one image each, every layer quantized by itself and by its
range, activations in float. `students/tuneqdm/export` holds the student, and sets of scales are
saved and switched by `dmq_jax.scale_sets`. Float, as the paper has it: 3.2 GB; at W4 0.4 GB.
"""

from dmq_jax.config import published, student


def get_config():
    """Options of the run; all defaults are in `dmq_jax.config`."""
    config = published(
        '',
        path='checkpoints/stable-diffusion-v1-5',
        sampler={
            'name': 'plms', 'num_steps': 50, 'guidance_scale': 7.5, 'final_alpha': 'first',
        },
        student_sampler={'num_steps': 50, 'guidance_scale': 7.5, 'final_alpha': 'first'},
        num_iterations=0,
        batch_size=4,
        calibrate_batch_size=4,
        num_images=16,
    )  # fmt: skip
    config.data.path = 'photographs'
    # No activation is quantized, so that a glance at a few images is enough.
    config.calibrate.num_images = 4
    quant = {
        'weight_bits': 4, 'activation_bits': 32, 'coverage': 'full', 'weight_observer': 'minmax',
    }  # fmt: skip
    adapt = {'num_iterations': 400, 'batch_size': 1}
    config.students = {
        'peqa': student(
            {'name': 'tuneqdm', 'scales': 'output', 'num_experts': 1}, quant=quant, adapt=adapt
        ),
        'tuneqdm': student('tuneqdm', quant=quant, adapt=adapt),
    }
    return config
