"""Options of a run: its students, and what is done to all of them."""

import dataclasses
from typing import Literal

from dmq_jax.config.checks import FLOAT_BITS, check, check_at_least, check_choices
from dmq_jax.config.drawing import CalibrateConfig, SamplerConfig, TeacherConfig
from dmq_jax.config.learning import AdaptConfig, DataConfig, FinetuneConfig, ReconstructConfig
from dmq_jax.config.methods import FullFinetuningConfig, MethodConfig, RoundToNearestConfig, why_not
from dmq_jax.config.quantization import QuantConfig

# By which a student learns, in this order: fields of its options, and folders of a run.
LEARNING_STAGES = ('reconstruct', 'finetune', 'adapt')


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """One quantized network of a run."""

    method: MethodConfig = RoundToNearestConfig()
    quant: QuantConfig = QuantConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    adapt: AdaptConfig = AdaptConfig()
    title: str = ''  # in the table of a comparison; '': what the method is called

    def __post_init__(self):
        for name in LEARNING_STAGES:
            num_iterations, lack = getattr(self, name).num_iterations, why_not(name, self.method)
            check(
                num_iterations == 0 or lack is None,
                f'{name}.num_iterations={num_iterations}: the method {self.method.name!r} {lack}; '
                f'set it to 0 or choose another method.',
            )
        is_float = self.quant.weight_bits == self.quant.activation_bits == FLOAT_BITS
        check(
            not is_float or bool(self.quant.rules) or isinstance(self.method, FullFinetuningConfig),
            f'quant.weight_bits=32 and activation_bits=32: the method {self.method.name!r} has '
            f"nothing to quantize; choose fewer bits, or the method 'full_finetuning'.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """The images drawn from every network for evaluation."""

    num_images: int = 1000  # images per network
    batch_size: int = 100  # images per network call; does not change the images
    mode: Literal['integer', 'fake'] = 'integer'  # multiply integers, or simulate in float
    # a text file, one prompt a line, of a text-conditional teacher: image i has prompt i, and
    # again from the first; calibration and fine-tuning take the same ones; None: data.prompt
    prompts: str | None = None

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, 'num_images', 'batch_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the images are compared with, and in which feature space."""

    # 'bundled', a classifier that train_teacher wrote, or 'inception': ADM's FID and its kin
    features: str = 'bundled'
    # bundled statistics or an .npz; for 'inception' whatever dmq_jax.evaluate takes as REF
    reference: str = 'fashion_mnist'
    # weights of 'inception'; '': the file that DMQ_INCEPTION_WEIGHTS names
    inception_weights: str = ''
    batch_size: int = 32  # images per call of the network of 'inception'

    def __post_init__(self):
        for name in ('features', 'reference'):
            check(bool(getattr(self, name)), f"{name}='': expected a bundled name or a file.")
        check_at_least(self, 1, 'batch_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The pictures of the report."""

    grid_size: int = 8  # rows and columns of an image grid
    layers: tuple[str, ...] = ()  # paths whose scales are plotted over t; (): a few are chosen

    def __post_init__(self):
        check_at_least(self, 1, 'grid_size')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices of a run."""

    # batches have data * fsdp parts, and the product of the three is the number of devices used;
    # one may be -1: all the devices that the others leave
    data: int = -1
    fsdp: int = 1  # parts of weights and optimizer state as well: less memory, more traffic
    tensor: int = 1  # parts of the output channels of weights

    def __post_init__(self):
        for name in ('data', 'fsdp', 'tensor'):
            size = getattr(self, name)
            check(
                size == -1 or size >= 1,
                f'{name}={size}: expected a number of devices, or -1 for all that are left.',
            )
        check(
            (self.data, self.fsdp, self.tensor).count(-1) <= 1,
            f'data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}: only one may be -1; set '
            f'the others to numbers of devices.',
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run: one teacher, any number of students, the same samples and metrics for all."""

    seed: int = 0  # root of every random number
    teacher: TeacherConfig = TeacherConfig()
    sampler: SamplerConfig = SamplerConfig()  # draws the evaluated images
    calibrate: CalibrateConfig = CalibrateConfig()
    data: DataConfig = DataConfig()
    students: dict[str, StudentConfig] = dataclasses.field(default_factory=dict)  # name: student
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        check(
            0 <= self.seed < 2**32, f'seed={self.seed}: expected 0..2^32-1 (a 32-bit random seed).'
        )
        for name in self.students:
            check(
                name.isidentifier() and name != 'teacher',
                f"students has the name {name!r}: expected letters, digits and '_' (it names "
                f"folders and command line options), and not 'teacher'.",
            )
            num_iterations = self.students[name].adapt.num_iterations
            check(
                num_iterations == 0 or bool(self.data.path),
                f"students.{name}.adapt.num_iterations={num_iterations} with data.path='': "
                f"expected images as data.path: an .npz, a folder, tfds:NAME, or 'teacher' for "
                f'images that the teacher draws; adapt.num_iterations=0 leaves the stage out.',
            )
