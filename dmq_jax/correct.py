"""Teacher and student predict along the same trajectories -> a correction of the student.

For methods that have one (`Method.correct`); it needs the network that the state was bound to, and
so comes after all learning.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from dmq_jax import denoisers
from dmq_jax.config import CalibrateConfig
from dmq_jax.diffusion import samplers
from dmq_jax.methods.base import Bound, Method
from dmq_jax.quant.plan import Plan
from dmq_jax.runtime.progress import progress


def run(
    teacher: denoisers.Denoiser,
    method: Method,
    bound: Bound,
    plan: Plan,
    timesteps: Int[np.ndarray, 'S'],
    lookup: str,
    config: CalibrateConfig,
    *,
    key: Key[Array, ''],
) -> Bound:
    """`bound` with the correction that `method` fits; as it is, if the method has none.

    Args:
      teacher: the float network.
      method: of `bound`.
      bound: the student.
      plan: what is quantized.
      timesteps: of the rows of its tables: those that the sampler of `config` visits.
      lookup: how a row is found.
      config: of the calibration: images and sampler are the same.
      key: root key of the images.
    """
    if method.correct is None:
        return bound
    sampler = denoisers.make_denoiser_sampler(teacher, config.sampler)
    assert np.array_equal(sampler.timesteps, timesteps), 'calibrated with another sampler'
    student = denoisers.fake_student(teacher, plan, bound, timesteps, lookup)
    info, channels = teacher.info, teacher.info.image_shape[2]
    guided = denoisers.guided(
        teacher.predict, info, config.sampler.guidance_scale, keep_variance=sampler.learns_variance
    )

    @jax.jit
    def predict_both(params, quantized, sampler, keys, y):
        def visit(x, t):
            pair = student.predict(quantized, x, t, y), teacher.predict(params, x, t, y)
            return guided(params, x, t, y), [p[..., :channels].astype(jnp.float32) for p in pair]

        x_T = samplers.initial_noise(keys, info.image_shape)
        return samplers.sample(visit, sampler, x_T, keys)[1]

    labels = denoisers.balanced_labels(config.num_images, info.num_classes)
    batch_size = min(config.batch_size, config.num_images)
    pairs = []
    for begin in progress(range(0, config.num_images, batch_size), 'correct'):
        indices = np.arange(begin, begin + batch_size, dtype=np.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(indices))
        y = None if labels is None else jnp.asarray(labels[indices])
        pairs.append(jax.device_get(predict_both(teacher.params, student.params, sampler, keys, y)))
    whole = [np.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True)]
    return bound._replace(correction=jax.jit(method.correct)(*whole))
