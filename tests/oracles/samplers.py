"""Samplers in NumPy float64, each in the form its paper prints, one trajectory at a time.

`predict(x, t)` returns eps; `abar` is alphas_cumprod at the timesteps visited followed by the value
after the last step; every function returns the x after each step, stacked.
"""

import numpy as np


def ddpm(predict, timesteps, abar, x, noises, *, variance='fixed_small'):
    """arXiv:2006.11239, algorithm 2 (the mean of eq. 11, not of eq. 7)."""
    xs = []
    for i, t in enumerate(timesteps):
        alpha = abar[i] / abar[i + 1]
        mean = (x - (1 - alpha) / np.sqrt(1 - abar[i]) * predict(x, t)) / np.sqrt(alpha)
        spread = 1 - alpha
        if variance == 'fixed_small':
            spread *= (1 - abar[i + 1]) / (1 - abar[i])
        last = i == len(timesteps) - 1
        x = mean if last else mean + np.sqrt(spread) * noises[i]
        xs.append(x)
    return np.stack(xs)


def ddim(predict, timesteps, abar, x, noises, *, eta=0.0, clip=None):
    """arXiv:2010.02502, eq. 12 and 16."""
    xs = []
    for i, t in enumerate(timesteps):
        now, then = abar[i], abar[i + 1]
        eps = predict(x, t)
        image = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        if clip is not None:
            image = np.clip(image, -clip, clip)
            eps = (x - np.sqrt(now) * image) / np.sqrt(1 - now)
        spread = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        x = np.sqrt(then) * image + np.sqrt(1 - then - spread**2) * eps + spread * noises[i]
        xs.append(x)
    return np.stack(xs)


def dpm_solver(predict, timesteps, abar, x, noises):
    """arXiv:2211.01095, algorithm 2; first order in the first and in the last step."""
    del noises
    xs, previous_image, previous_h = [], None, None
    for i, t in enumerate(timesteps):
        alpha, sigma = np.sqrt(abar[i]), np.sqrt(1 - abar[i])
        alpha_next, sigma_next = np.sqrt(abar[i + 1]), np.sqrt(1 - abar[i + 1])
        image = (x - sigma * predict(x, t)) / alpha
        if i == len(timesteps) - 1:
            # DDIM is DPM-Solver++ of first order (section 4.1).
            x = alpha_next * image + sigma_next * (x - alpha * image) / sigma
        else:
            h = np.log(alpha_next / sigma_next) - np.log(alpha / sigma)
            direction = image
            if previous_image is not None:
                r = previous_h / h
                direction = (1 + 1 / (2 * r)) * image - 1 / (2 * r) * previous_image
            x = sigma_next / sigma * x - alpha_next * np.expm1(-h) * direction
            previous_image, previous_h = image, h
        xs.append(x)
    return np.stack(xs)
