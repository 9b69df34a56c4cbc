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


def plms(predict, timesteps, abar, x):
    """Latent diffusion's PLMS: improved Euler, then Adams-Bashforth; x after each timestep."""

    def move(x, eps, i):
        image = (x - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        return np.sqrt(abar[i + 1]) * image + np.sqrt(1 - abar[i + 1]) * eps

    xs, past = [], []
    for i, t in enumerate(timesteps):
        eps = predict(x, t)
        match len(past):
            case 0:
                blend = (eps + predict(move(x, eps, i), timesteps[i + 1])) / 2
            case 1:
                blend = (3 * eps - past[-1]) / 2
            case 2:
                blend = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
            case _:
                blend = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        past.append(eps)
        x = move(x, blend, i)
        xs.append(x)
    return np.stack(xs)


def adm(predict, visited, abar, x, noises, *, clip):
    """ADM's `p_sample` of a respaced process with a learned range of variances.

    `visited` ascends, `abar` belongs to it; `predict(x, t)` returns eps and a value in [-1, 1]. The
    process is made anew from the betas between the timesteps kept, as ADM does.
    """
    betas = 1 - abar / np.append(1.0, abar[:-1])
    kept = np.cumprod(1 - betas)
    before = np.append(1.0, kept[:-1])
    posterior = betas * (1 - before) / (1 - kept)
    log_low = np.log(np.append(posterior[1], posterior[1:]))
    xs = []
    for i in reversed(range(len(visited))):
        eps, place = predict(x, visited[i])
        image = np.sqrt(1 / kept[i]) * x - np.sqrt(1 / kept[i] - 1) * eps
        image = np.clip(image, -clip, clip)
        mean = betas[i] * np.sqrt(before[i]) / (1 - kept[i]) * image
        mean += (1 - before[i]) * np.sqrt(1 - betas[i]) / (1 - kept[i]) * x
        share = (place + 1) / 2
        log_variance = share * np.log(betas[i]) + (1 - share) * log_low[i]
        noise = noises[len(visited) - 1 - i]
        x = mean + (np.exp(log_variance / 2) * noise if i else 0.0)
        xs.append(x)
    return np.stack(xs)


def adm_timesteps(num_timesteps, sections):
    """ADM's respacing: equal sections, the first ones longer by the remainder, strided evenly."""
    lengths = [len(part) for part in np.array_split(np.arange(num_timesteps), len(sections))]
    begins = np.cumsum([0, *lengths])
    visited = []
    for begin, length, count in zip(begins, lengths, sections, strict=False):
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        places = np.cumsum([0.0] + [stride] * (count - 1))
        visited += [int(begin) + round(float(place)) for place in places]
    return visited
