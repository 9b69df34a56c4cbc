"""Options of the training of a small float teacher."""

import dataclasses
from typing import Literal

from dmq_jax.config.checks import check, check_at_least, check_choices
from dmq_jax.config.run import MeshConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Labelled images: an `.npz`, a folder with one subfolder per class, or a TFDS name."""

    # an .npz with {train,test}_{images,labels}, a folder, or 'tfds:NAME'
    path: str = 'data/fashion_mnist.npz'
    image_size: int = 32  # smaller images are padded with zeros on every side
    num_classes: int = 10  # labels are 0..num_classes-1

    def __post_init__(self):
        check(bool(self.path), "path='': expected an .npz, a folder or tfds:NAME.")
        check_at_least(self, 1, 'image_size', 'num_classes')


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The teacher's U-Net (`models/ddpm_unet.py`)."""

    channels: tuple[int, ...] = (32, 64, 96)  # width of each level, finest first
    layers_per_block: int = 1  # residual blocks per level on the way down
    attention: tuple[bool, ...] = (False, True, False)  # levels with attention
    head_dim: int | None = 32  # channels of one attention head; None: a single head
    num_groups: int = 8  # groups of every GroupNorm
    patch_size: int = 2  # pixels folded into channels along each side before the first layer

    def __post_init__(self):
        check_at_least(self, 1, 'layers_per_block', 'num_groups', 'patch_size')
        check(
            len(self.attention) == len(self.channels),
            f'attention={self.attention}: expected one entry for each of {self.channels}.',
        )
        for width in self.channels:
            check(
                width % self.num_groups == 0,
                f'channels={self.channels}: expected multiples of num_groups={self.num_groups}.',
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The small classifier whose features and accuracy judge the samples."""

    num_epochs: int = 10  # passes over the training images
    batch_size: int = 64  # images per optimizer step
    learning_rate: float = 3e-3  # peak of the cosine schedule

    def __post_init__(self):
        check_at_least(self, 1, 'num_epochs', 'batch_size')
        check_at_least(self, 0, 'learning_rate')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainTeacherConfig:
    """Training of a small class-conditional float teacher, and of its classifier."""

    name: str = 'fashion_mnist'  # stem of the files written
    seed: int = 0  # root of every random number
    dataset: DatasetConfig = DatasetConfig()
    network: NetworkConfig = NetworkConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    schedule: Literal['linear', 'cosine', 'scaled_linear'] = 'linear'  # noise schedule
    prediction: Literal['eps', 'v'] = 'eps'  # what the network predicts
    num_iterations: int = 7_500  # optimizer steps
    batch_size: int = 64  # images per optimizer step
    learning_rate: float = 8e-4  # peak; cosine decay to 1 % after the warm-up
    warmup_iterations: int = 500  # steps from 0 to the peak
    ema_decay: float = 0.999  # of the averaged weights that are kept
    label_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of the computation; weights are float32
    log_every: int = 50  # steps between lines of metrics.jsonl
    checkpoint_every: int = 250  # steps between checkpoints
    preview_every: int = 2000  # steps between grids of samples
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check_choices(self)
        positive = 'num_iterations', 'batch_size', 'log_every', 'checkpoint_every', 'preview_every'
        check_at_least(self, 1, *positive)
        check_at_least(self, 0, 'learning_rate', 'warmup_iterations')
        check(0 <= self.ema_decay < 1, f'ema_decay={self.ema_decay}: expected 0..1 (below 1).')
        check(0 <= self.label_dropout < 1, f'label_dropout={self.label_dropout}: expected 0..1.')
