import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import calibrate, denoisers
from dmq_jax.config import CalibrateConfig
from dmq_jax.diffusion import samplers
from dmq_jax.quant.layers import collect_stats, observe_inputs
from dmq_jax.runtime import mesh
from tests import tiny

# float32 sums in another order, through three passes of the network; relative to the largest
# value of the tensor. Measured on CPU: 1.1e-6 at most, in both tests that use it.
TOLERANCE = 5e-5


def assert_close_stats(found, expected):
    assert found.keys() == expected.keys()
    for path, roles in expected.items():
        for role, stats in roles.items():
            size = np.abs(stats.values).max()
            for field, value in stats._asdict().items():
                if value is None:
                    assert getattr(found[path][role], field) is None
                    continue
                error = np.abs(getattr(found[path][role], field) - value).max() / size
                assert error < TOLERANCE, f'{path} {role} {field}: {error:.1e}'


def observed():
    """A plan that observes some layers of each kind."""
    return {path: spec for path, spec in tiny.observed().items() if re.match('conv_in|down', path)}


@functools.cache
def calibration():
    return calibrate.run(
        tiny.teacher(), observed(), tiny.CALIBRATE, key=jax.random.key(1),
        device_mesh=mesh.make_mesh(1),
    )  # fmt: skip


@functools.cache
def manual_loop():
    """Statistics of the first batch, one observed call of the network at a time."""
    teacher, plan = tiny.teacher(), observed()
    sampler = denoisers.make_denoiser_sampler(teacher, tiny.SAMPLER)
    indices = jnp.arange(tiny.CALIBRATE.batch_size, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), indices)
    labels = (indices % tiny.NUM_CLASSES).astype(jnp.int32)

    @jax.jit
    def observe(x, t):
        with observe_inputs(plan, tiny.CALIBRATE.values_per_tensor):
            prediction, found = teacher.network.apply(
                {'params': teacher.params}, x, t, labels, mutable=['stats']
            )
        return prediction, collect_stats(plan, found['stats'])

    carry = sampler.init(samplers.initial_noise(keys, teacher.info.image_shape))
    rows = []
    for i, t in enumerate(sampler.timesteps):
        prediction, stats = observe(carry.x, jnp.asarray(t))
        rows.append(stats)
        carry = sampler.step(carry, prediction, i)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def samples_of_first_batch(stats):
    """The values and extremes of the first batch; the rest is of all batches together."""
    n = tiny.CALIBRATE.values_per_tensor
    zeros = np.zeros(tiny.SAMPLER.num_steps)
    return {
        path: {
            role: tensor._replace(
                values=tensor.values[:, :n], extremes=tensor.extremes[:, : 2 * n],
                low=zeros, high=zeros, count=zeros,
            )
            for role, tensor in roles.items()
        }
        for path, roles in stats.items()
    }  # fmt: skip


def test_rows_are_what_is_seen_at_each_timestep_of_a_manual_loop():
    result = calibration()
    assert result.timesteps.tolist() == sorted(result.timesteps.tolist(), reverse=True)
    assert len(result.timesteps) == tiny.SAMPLER.num_steps
    assert result.stats.keys() == observed().keys()
    assert_close_stats(samples_of_first_batch(result.stats), samples_of_first_batch(manual_loop()))


def test_merged_statistics_cover_every_batch():
    for path, roles in calibration().stats.items():
        for role, stats in roles.items():
            lead = (tiny.SAMPLER.num_steps,)
            batches = tiny.CALIBRATE.num_images // tiny.CALIBRATE.batch_size
            assert stats.low.shape == stats.high.shape == stats.count.shape == lead, path
            n = batches * tiny.CALIBRATE.values_per_tensor
            assert stats.values.shape == (*lead, n) and stats.extremes.shape == (*lead, 2 * n)
            np.testing.assert_array_equal(stats.extremes.min(axis=1), stats.low, err_msg=role)
            np.testing.assert_array_equal(stats.extremes.max(axis=1), stats.high, err_msg=role)
            assert (stats.values >= stats.low[:, None]).all()
            assert (stats.values <= stats.high[:, None]).all()


def test_the_count_is_the_number_of_values_seen():
    stats = calibration().stats['conv_in']['input']
    assert stats.count.tolist() == [tiny.CALIBRATE.num_images * 8 * 8] * 3


def test_statistics_do_not_depend_on_the_number_of_devices():
    eight = calibrate.run(
        tiny.teacher(), observed(), tiny.CALIBRATE,
        key=jax.random.key(1), device_mesh=mesh.make_mesh(8),
    )  # fmt: skip
    np.testing.assert_array_equal(eight.timesteps, calibration().timesteps)
    assert_close_stats(eight.stats, calibration().stats)


def test_saved_statistics_come_back_equal(tmp_path):
    calibrate.save(tmp_path / 'stats.npz', calibration())
    loaded = calibrate.load(tmp_path / 'stats.npz')
    assert loaded.timesteps.dtype == calibration().timesteps.dtype
    jax.tree.map(np.testing.assert_array_equal, loaded, calibration())


def test_a_batch_that_the_devices_do_not_divide_is_refused_by_name():
    config = CalibrateConfig(num_images=12, batch_size=12, sampler=tiny.SAMPLER)
    with pytest.raises(ValueError, match=r'calibrate.batch_size=12 is not divisible by 8'):
        calibrate.run(
            tiny.teacher(), observed(), config,
            key=jax.random.key(1), device_mesh=mesh.make_mesh(8),
        )  # fmt: skip


def test_ranges_of_channels_are_collected_where_asked_for_and_come_back(tmp_path):
    part = 'up_0/block_0/conv1/inputs_0_8'
    plan = {path: tiny.observed()['conv_in'] for path in ('up_0/block_0/conv1', part)}
    found = calibrate.run(
        tiny.teacher(), plan, tiny.CALIBRATE, key=jax.random.key(1),
        device_mesh=mesh.make_mesh(1), channels=True,
    )  # fmt: skip
    calibrate.save(tmp_path / 'stats.npz', found)
    loaded = calibrate.load(tmp_path / 'stats.npz').stats
    jax.tree.map(np.testing.assert_array_equal, loaded, found.stats)
    whole, half = (loaded[path]['input'] for path in plan)
    lead = (tiny.SAMPLER.num_steps,)
    assert whole.channel_low.shape == (*lead, 16) and half.channel_low.shape == (*lead, 8)
    np.testing.assert_array_equal(whole.channel_high.max(axis=1), whole.high)
    np.testing.assert_array_equal(whole.channel_high[:, :8], half.channel_high)
    assert whole.channels.shape == whole.values.shape
