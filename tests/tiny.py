"""A teacher of a few thousand weights, and what is made from it, once per process.

Weights are NumPy numbers: compiling an initialisation would take longer than most tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from dmq_jax import calibrate, denoisers, methods
from dmq_jax.config import CalibrateConfig, QuantConfig, RoundToNearestConfig, SamplerConfig
from dmq_jax.denoisers import DenoiserInfo, float_denoiser
from dmq_jax.diffusion.schedule import Schedule
from dmq_jax.metrics import classifier, inception, inception_weights
from dmq_jax.models.ddpm_unet import DDPMUNet
from dmq_jax.quant.plan import LayerSpec
from dmq_jax.runtime import mesh

NUM_CLASSES = 3
NETWORK = DDPMUNet(
    channels=(8,), in_channels=1, layers_per_block=1, num_groups=4, down_attention=(True,),
    mid_attention=False, num_class_embeds=NUM_CLASSES + 1,
)  # fmt: skip
INFO = DenoiserInfo(
    schedule=Schedule(kind='linear', num_train_timesteps=50, beta_start=1e-3, beta_end=0.1),
    prediction='eps',
    image_shape=(8, 8, 1),
    num_classes=NUM_CLASSES,
)
SAMPLER = SamplerConfig(num_steps=3)
CALIBRATE = CalibrateConfig(num_images=16, batch_size=8, values_per_tensor=32, sampler=SAMPLER)


def random_like(shapes, seed=0, scale=0.3):
    """A tree of random numbers, exact in float16, in the shapes of a tree of `jax.eval_shape`."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        numbers = (scale * rng.standard_normal(leaf.shape)).astype(np.float16)
        return numbers.astype(np.float32)

    # `jnp.asarray` would compile a program for every shape.
    return jax.device_put(jax.tree.map(draw, shapes))


def random_denoiser(network, info=INFO, fill=random_like):
    """A float network with the weights that `fill` makes of a tree of shapes."""
    shapes = denoisers.param_shapes(network, info)
    return float_denoiser(network, fill(shapes), info)


def like_initial(shapes):
    """Random weights of the size that an initialisation gives them; norms do nothing."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        numbers = rng.standard_normal(leaf.shape) / np.sqrt(max(1, np.prod(leaf.shape[:-1])))
        return np.float32(numbers + (path[-1].key == 'scale'))

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@functools.cache
def teacher():
    return random_denoiser(NETWORK)


def observed():
    """A plan that observes every layer."""
    layers = denoisers.quantizable(teacher())
    return {path: LayerSpec(weight=None, inputs=denoisers.OBSERVED) for path in layers}


@functools.cache
def calibration():
    return calibrate.run(
        teacher(), observed(), CALIBRATE, key=jax.random.key(1), device_mesh=mesh.make_mesh(1)
    )


@functools.cache
def rounded(**quant):
    """Plan and `Bound` of a student rounded to nearest."""
    options = {'coverage': 'full', 'weight_observer': 'minmax', 'activation_observer': 'minmax'}
    plan = denoisers.make_plan(denoisers.quantizable(teacher()), QuantConfig(**(options | quant)))
    method = methods.make(RoundToNearestConfig(), plan)

    @jax.jit
    def bind(params, stats):
        return method.bind(params, method.init(params, stats, jax.random.key(0)))

    return plan, bind(teacher().params, calibration().stats)


def real_images(num_images=60, seed=0, side=8):
    """Labelled images: noise with a bright bar at a height of the class."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(num_images) % NUM_CLASSES).astype(np.int32)
    images = rng.integers(0, 80, (num_images, side, side, 1))
    for image, label in zip(images, labels, strict=True):
        image[side // 4 * label : side // 4 * (label + 1)] += 170
    return images.astype(np.uint8), labels


@functools.cache
def feature_network():
    """An untrained classifier: any features will do."""
    model = classifier.Classifier(num_classes=NUM_CLASSES, features=8, widths=(8,))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    return classifier.FeatureNetwork(model, random_like(shapes['params'], seed=1))


def write_evaluation(folder, side=8):
    """Files for `config.evaluate`: (features, reference)."""
    files = folder / 'tiny_classifier.safetensors', folder / 'tiny_reference.npz'
    classifier.save_classifier(files[0], feature_network())
    images, _ = real_images(side=side)
    loaded = classifier.load_classifier(files[0])
    classifier.save_reference(files[1], classifier.make_reference(loaded, images, batch_size=60))
    return files


def write_inception(path):
    """Random weights of the FID network, whose features differ from image to image."""
    rng = np.random.default_rng(0)

    def fill(shape):
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 100
        return (rng.standard_normal(shape) * np.sqrt(2 / fan_in)).astype(np.float32)

    # Shapes that whoever reads the file needs too: the network is traced once.
    shapes = sorted(inception._parameter_shapes().items(), key=lambda item: item[0].split('/'))
    flat = {name: fill(shape) for name, shape in shapes}
    save_file(flat, path, {'format': inception_weights.FORMAT})
    return path
