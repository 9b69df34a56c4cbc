"""The way of a checkpoint through the project: load, sample, quantize, export, sample integers."""

import contextlib
import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dmq_jax
from dmq_jax import api, denoisers, finetune
from dmq_jax.quant.tensor import unpack

STEPS = 2
# The same loss of the same numbers, once with its gradient and once alone: sums in another order.
LOSS_TOLERANCE = 1e-3
OPTIONS = {
    'weight_observer': 'minmax', 'activation_observer': 'minmax', 'weight_bits': 4,
    'activation_bits': 8,
}  # fmt: skip


def travel(teacher, folder, *, guidance_scale=1.0):
    """Everything a user does with a teacher, checked on the way; the images it ends at."""
    with compiled_quickly():
        return _travel(teacher, folder, guidance_scale)


@contextlib.contextmanager
def compiled_quickly():
    """For programs that run once or twice: nearly all the time is the compiler's."""
    before = jax.config.values['jax_disable_most_optimizations']
    jax.config.update('jax_disable_most_optimizations', True)
    try:
        yield
    finally:
        jax.config.update('jax_disable_most_optimizations', before)


def _travel(teacher, folder, guidance_scale):
    sampler = {'num_steps': STEPS, 'guidance_scale': guidance_scale}
    with recorded_finetuning() as finetuning:
        model = api.quantize(
            teacher, 'efficientdm', num_iterations=3, workdir=folder / 'run',
            method_options={'lora_rank': 2},
            calibrate_options={'num_images': 2, 'batch_size': 2, 'values_per_tensor': 16,
                               'sampler': sampler},
            finetune_options={'batch_size': 2, 'log_every': 1, 'sampler': sampler},
            **OPTIONS,
        )  # fmt: skip
    metrics = folder / 'run/students/efficientdm/finetune/metrics.jsonl'
    losses = [
        value
        for line in metrics.read_text().splitlines()
        for name, value in json.loads(line).items()
        if name == 'loss'
    ]
    assert len(losses) == 3 and np.isfinite(losses).all()
    before, after = losses_of_the_first_batch(*finetuning)
    assert before == pytest.approx(losses[0], rel=LOSS_TOLERANCE)
    assert after < before, f'three steps took the loss from {before:.4g} to {after:.4g}'

    api.export(model, folder / 'export')
    loaded = dmq_jax.load(folder / 'export')
    assert loaded.info == model.info and loaded.network == model.network
    assert loaded.weights.keys() == model.weights.keys() and loaded.weights
    for path, weight in model.weights.items():
        np.testing.assert_array_equal(unpack(loaded.weights[path]), unpack(weight), err_msg=path)

    images = [
        api.sample(source, num_images=2, batch_size=2, **sampler) for source in (teacher, loaded)
    ]
    for each in images:
        assert each.dtype == np.uint8 and each.shape == (2, *image_shape(teacher))
    assert np.isfinite(last_latents(teacher)).all()
    return images


@contextlib.contextmanager
def recorded_finetuning():
    """A list that will hold the arguments of the fine-tuning, and the state that it learnt."""
    calls, run = [], finetune.run

    def recorded(*args, **options):
        result = run(*args, **options)
        calls.extend((args, options['key'], result.state))
        return result

    with mock.patch.object(finetune, 'run', recorded):
        yield calls


def losses_of_the_first_batch(args, key, learnt):
    """The loss of the start state and of the learnt one, on what the first step saw."""
    teacher, method, start, plan, timesteps, lookup, config = args
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    loss = jax.jit(finetune.make_loss(teacher, method, plan, timesteps, lookup, config))
    draw = jax.jit(functools.partial(finetune.start_positions, teacher, sampler, config))
    positions = draw(teacher.params, key)
    t = jnp.asarray(sampler.timesteps)[positions.index]
    gain = finetune.step_gain(sampler, config.target)[positions.index]
    return [
        float(loss(state, teacher.params, positions.carry.x, t, positions.labels, gain)[0])
        for state in (start, learnt)
    ]


def image_shape(teacher):
    """Of what a teacher draws, decoded if they are latents."""
    height, width, channels = teacher.info.image_shape
    if teacher.decoder is None:
        return height, width, channels
    network = teacher.decoder.network
    factor = 2 ** (len(network.channels) - 1)
    return height * factor, width * factor, network.out_channels


def last_latents(teacher):
    """What the network says of noise."""
    x = np.random.default_rng(0).standard_normal((2, *teacher.info.image_shape))
    y = None if teacher.info.num_classes is None else np.zeros(2, np.int32)
    return jax.jit(teacher.predict)(teacher.params, x.astype(np.float32), np.int32(500), y)
