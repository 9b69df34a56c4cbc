"""Options of the stages of learning: how long, on what, in which batches."""

import dataclasses
from typing import Literal

from dmq_jax.config.checks import check, check_at_least, check_choices, check_patterns
from dmq_jax.config.drawing import SamplerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Block by block towards the teacher, for methods that learn so; before fine-tuning."""

    num_iterations: int = 0  # optimizer steps per block and pass; 0: none. The papers' 20,000
    batch_size: int = 32  # samples per optimizer step
    # kept in memory at the input and the output of one block at a time: this many timesteps, evenly
    # spaced on the trajectories, times images, times 2 with guidance; the papers' 20 x 256
    num_timesteps: int = 20
    num_images: int = 256
    sampler: SamplerConfig = SamplerConfig()  # draws the trajectories
    # regular expression over module paths; an outermost module it matches whole is one block, each
    # quantized layer outside of them is one by itself
    blocks: str = r'(.*/)?((block|attention)_\d+|downsample|upsample)'
    # rounds after the first draw their inputs with the student of the round before (TCAQ-DM)
    num_rounds: int = 1
    later_share: float = 0.5  # iterations of a later round per one of the first

    def __post_init__(self):
        check_at_least(self, 0, 'num_iterations')
        check_at_least(self, 1, 'batch_size', 'num_timesteps', 'num_images', 'num_rounds')
        check(0 < self.later_share <= 1, f'later_share={self.later_share}: expected 0..1.')
        check(
            self.num_timesteps <= self.sampler.num_steps,
            f'num_timesteps={self.num_timesteps}: expected at most the '
            f'{self.sampler.num_steps} steps of its sampler.',
        )
        check_patterns(self, 'blocks')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Distillation of the teacher into the student, for methods that learn."""

    num_iterations: int = 0  # optimizer steps; 0: calibrate only
    batch_size: int = 16  # images per optimizer step
    sampler: SamplerConfig = SamplerConfig()  # draws the x_t the two are compared at
    # 'trajectory': a batch descends all timesteps together; 'staggered': one start per image
    positions: Literal['trajectory', 'staggered'] = 'staggered'
    # who leads the trajectories: 'student' meets the errors it has made before, as in sampling
    drawn_by: Literal['teacher', 'student'] = 'teacher'
    # 'prediction': compare what the two predict; 'step': where it takes the sampler next;
    # 'balanced': between the two
    target: Literal['prediction', 'step', 'balanced'] = 'balanced'
    remat: bool = False  # recompute activations in the backward pass: less memory, more time
    schedule: Literal['linear', 'cosine'] = 'cosine'  # decay of the learning rates to zero
    checkpoint_every: int = 200  # optimizer steps between checkpoints
    log_every: int = 20  # optimizer steps between lines of metrics.jsonl
    max_to_keep: int = 2  # checkpoints kept; older ones are deleted

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 0, 'num_iterations')
        check_at_least(self, 1, 'batch_size', 'checkpoint_every', 'log_every', 'max_to_keep')
        check(
            self.sampler.variance != 'learned_range',
            "finetune.sampler.variance='learned_range': the predictions compared are those of eps "
            "or v alone; use name='ddim', or a fixed variance.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images of one's own, which the stage `adapt` of every student learns from."""

    # an .npz, a folder of images or of one subfolder per class, or tfds:NAME; 'teacher': drawn from
    # the teacher itself by the run's sampler (a folder of that name is './teacher')
    path: str = ''
    # what shall not be forgotten, given as `path` is: a batch of these beside each one of `path`
    # (prior preservation, DreamBooth, arXiv:2208.12242); '': none
    class_path: str = ''
    # of a teacher of texts: what images show that have no text of their own (beside NAME.png in
    # NAME.txt, or as "text" in metadata.jsonl); '' is the empty text, None: each must have one.
    # Without sample.prompts it is also what is drawn
    prompt: str | None = None
    class_prompt: str | None = None  # the same of the class images
    # images of another size than the teacher's: 'crop' scales them until they cover it and keeps
    # the middle, 'pad' puts zeros around smaller ones
    fit: Literal['crop', 'pad'] = 'crop'
    num_images: int = 256  # drawn where either path is 'teacher', evenly of all classes or prompts
    label: int = 0  # class of images without labels, for a teacher that has classes

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'num_images')
        check_at_least(self, 0, 'label')
        for name, needed in (('class_path', 'path'), ('class_prompt', 'class_path')):
            check(
                not getattr(self, name) or bool(getattr(self, needed)),
                f"{name}={getattr(self, name)!r} with {needed}='': expected data.{needed} as well.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Fine-tuning on images of one's own with the denoising loss, after all other learning."""

    num_iterations: int = 0  # optimizer steps; 0: none
    # weight of the loss of class images (`data.class_path`) beside that of one's own
    prior_weight: float = 1.0
    label_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    batch_size: int = 16  # images per optimizer step, each at a timestep of its own
    # regular expression over module paths: what is computed in them is computed again in the
    # backward pass, less memory for more time; '': nothing is
    remat: str = r'(.*/)?(block|attention)_\d+'
    checkpoint_every: int = 200  # optimizer steps between checkpoints
    log_every: int = 20  # optimizer steps between lines of metrics.jsonl

    def __post_init__(self):
        check_at_least(self, 0, 'num_iterations')
        check_at_least(self, 1, 'batch_size', 'checkpoint_every', 'log_every')
        check(self.prior_weight > 0, f'prior_weight={self.prior_weight}: expected more than 0.')
        check(0 <= self.label_dropout < 1, f'label_dropout={self.label_dropout}: expected 0..1.')
        check_patterns(self, 'remat')
