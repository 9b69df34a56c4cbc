"""Stable Diffusion 1.5, 512 x 512, from texts.

    python -m dmq_jax.main --config=configs/sd15.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/sd15

PATH: the folder of Stable Diffusion 1.5 of diffusers; or a single .ckpt or .safetensors of it, with
a folder that holds tokenizer/ as --config.teacher.components. One prompt a line in a file:
--config.sample.prompts=FILE.

Protocol of the papers: PLMS or DDIM, 50 steps, guidance 7.5. EfficientDM has no run of it.
Float on COCO, reported: FID 13.27, sFID 19.46, CLIP score 0.3064 (survey).
"""

from dmq_jax.config import published


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    return published(
        widths,
        path='checkpoints/stable-diffusion-v1-5',
        sampler={
            'name': 'plms', 'num_steps': 50, 'guidance_scale': 7.5, 'final_alpha': 'first',
        },
        student_sampler={'num_steps': 50, 'guidance_scale': 7.5, 'final_alpha': 'first'},
        num_iterations=16_000,
        batch_size=4,
        calibrate_batch_size=4,
        num_images=5_000,
    )  # fmt: skip
