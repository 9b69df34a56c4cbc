"""Moments of trajectories, on a network of two blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from dmq_jax import denoisers, trajectories
from dmq_jax.config import ReconstructConfig, SamplerConfig
from tests import tiny_blocks

CONFIG = ReconstructConfig(
    num_timesteps=2, num_images=12, batch_size=8, sampler=SamplerConfig(num_steps=4)
)


def test_inputs_are_spread_evenly_over_timesteps_and_repeatable():
    teacher = tiny_blocks.teacher()
    a, b = (
        trajectories.draw_inputs(teacher, teacher, CONFIG, key=jax.random.key(8)) for _ in range(2)
    )
    sampler = denoisers.make_denoiser_sampler(teacher, CONFIG.sampler)
    visited = np.asarray(sampler.timesteps)[[0, 2]]
    np.testing.assert_array_equal(a.t, np.repeat(visited, 12))
    assert a.x.shape == (24, 4, 4, 1)
    np.testing.assert_array_equal(a.x, b.x)


def test_inputs_come_back_from_their_file(tmp_path):
    x = jnp.ones((2, 3, 3, 1))
    for y in (None, jnp.asarray([1, 2]), {'label': jnp.asarray([1, 2])}):
        inputs = trajectories.Inputs(x, jnp.asarray([7, 8]), y)
        trajectories.save_inputs(tmp_path / 'a.npz', inputs, jax.random.key(9))
        loaded = trajectories.load_inputs(tmp_path / 'a.npz')
        jax.tree.map(np.testing.assert_array_equal, loaded, inputs)
        with np.load(tmp_path / 'a.npz') as arrays:
            np.testing.assert_array_equal(arrays['key'], jax.random.key_data(jax.random.key(9)))
