"""From noise to pixels, against diffusers on the same folder; text encoders are tested apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import denoisers, sampling
from dmq_jax.config import SamplerConfig
from dmq_jax.diffusion import samplers
from dmq_jax.teachers import load_teacher
from tests import tiny_checkpoints as tiny

SCALE, STEPS = 7.5, 3
# Both compute in float32, in their own order; guidance multiplies the differences by 7.5, and two
# pixels in a thousand may round to the other side.
TOLERANCE, ROUNDED = 1e-3, 0.01


@pytest.mark.slow
def test_noise_and_a_prompt_become_the_image_that_diffusers_makes_of_them(tmp_path):
    torch = pytest.importorskip('torch', reason='torch is the oracle here')
    diffusers = pytest.importorskip('diffusers', reason='diffusers is the oracle here')
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    folder = tiny.sd_folder(tmp_path)
    prompts, negative = ['a cat', 'a'], 'cat!'
    teacher = load_teacher(folder, prompts=prompts, negative_prompt=negative)
    config = SamplerConfig(num_steps=STEPS, guidance_scale=SCALE)
    sampler = denoisers.make_denoiser_sampler(teacher, config)
    keys = jax.random.split(jax.random.key(0), 2)
    labels = jnp.arange(2)
    latents = sampling.sample_latents(
        teacher.predict, teacher.info, SCALE, teacher.params, sampler, keys, labels
    )
    images = sampling.decode(teacher.decoder.network, teacher.decoder.params, latents)

    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet')
    vae = diffusers.AutoencoderKL.from_pretrained(folder / 'vae', variant='fp16')
    rows = np.asarray(teacher.params['conditions']['context'])
    context = torch.from_numpy(rows[[2, 2, 0, 1]])
    table = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    noise = np.asarray(samplers.initial_noise(keys, teacher.info.image_shape))
    x = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    times = np.asarray(sampler.timesteps)
    with torch.no_grad():
        for i, t in enumerate(times):
            null, own = unet(torch.cat([x, x]), int(t), context).sample.chunk(2)
            eps = null + SCALE * (own - null)
            alpha, sigma = table[t], np.sqrt(1 - table[t] ** 2)
            x_0 = (x - sigma * eps) / alpha
            after = 1.0 if i + 1 == STEPS else table[times[i + 1]]
            x = after * x_0 + np.sqrt(1 - after**2) * eps
        decoded = vae.decode(x / 0.18215).sample
    wanted = x.numpy().transpose(0, 2, 3, 1)
    error = np.linalg.norm(latents - wanted) / np.linalg.norm(wanted)
    assert error < TOLERANCE, f'{error:.1e}'
    pixels = np.clip(np.round((decoded.numpy().transpose(0, 2, 3, 1) + 1) * 127.5), 0, 255)
    gap = np.abs(pixels - np.asarray(images, np.float32))
    assert gap.max() <= 1 and np.mean(gap > 0) < ROUNDED
