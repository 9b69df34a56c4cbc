"""Stable Diffusion 1.5, 512 x 512, from texts.

    python -m dmq_jax.main --config=configs/sd15.py --stages=teacher,sample
        --config.teacher.path=PATH --workdir=runs/sd15

PATH: the folder of Stable Diffusion 1.5 of diffusers; or a single .ckpt or .safetensors of it, with
a folder that holds tokenizer/ as --config.teacher.components. One prompt a line in a file:
--config.sample.prompts=FILE.

Protocol of the papers: PLMS or DDIM, 50 steps, guidance 7.5. EfficientDM has no run of it.
Float on COCO, reported: FID 13.27, sFID 19.46, CLIP score 0.3064 (survey).
"""

from dmq_jax.config import at_widths, base


def get_config(widths: str = ''):
    """Options of the run; `:w4a8` after the name of this file adds a student of these widths."""
    config = base()
    config.teacher.path = 'checkpoints/stable-diffusion-v1-5'
    config.sampler.name = 'plms'
    config.sampler.num_steps = 50
    config.sampler.guidance_scale = 7.5
    config.sampler.final_alpha = 'first'
    config.calibrate.sampler.num_steps = 50
    config.calibrate.sampler.guidance_scale = 7.5
    config.calibrate.sampler.final_alpha = 'first'
    config.calibrate.batch_size = 4
    config.sample.num_images = 5_000
    config.sample.batch_size = 4
    config.evaluate.features = 'inception'
    config.students = at_widths(
        widths,
        num_iterations=16_000,
        sampler={'num_steps': 50, 'guidance_scale': 7.5, 'final_alpha': 'first'},
    )
    return config
