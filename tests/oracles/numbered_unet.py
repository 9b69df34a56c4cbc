"""The U-Nets of ADM and of CompVis' LDM in plain torch, under the names of their checkpoints.

Written from the papers and the shapes of the published checkpoints; layout NCHW inside. The module
tree spells the names: `input_blocks.4.1.qkv.weight` and so on.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, c_in, c_out, embedding, groups, scale_shift, resample=None):
        super().__init__()
        self.resample, self.scale_shift = resample, scale_shift
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in, 1e-5), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)
        )
        count = 2 * c_out if scale_shift else c_out
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, count))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, c_out, 1e-5), nn.SiLU(), nn.Dropout(0.0),
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )  # fmt: skip
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, embedding, context):
        norm, act, conv = self.in_layers
        h = act(norm(x))
        if self.resample == 'up':
            x, h = (F.interpolate(a, scale_factor=2, mode='nearest') for a in (x, h))
        if self.resample == 'down':
            x, h = (F.avg_pool2d(a, 2) for a in (x, h))
        h = conv(h)
        e = self.emb_layers(embedding)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.scale_shift:
            c = h.shape[1]
            h = norm(h) * (1 + e[:, :c]) + e[:, c:]
        else:
            h = norm(h + e)
        for layer in rest:
            h = layer(h)
        return self.skip_connection(x) + h


def attention(q, k, v):
    """Of one head; the last axes are [tokens, features]."""
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


class PixelAttention(nn.Module):
    """One head at a time, sliced out of the fused tensor by row numbers."""

    def __init__(self, c, heads, groups, new_order):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(groups, c, 1e-5)
        self.qkv = nn.Conv1d(c, 3 * c, 1)
        self.proj_out = nn.Conv1d(c, c, 1)

    def forward(self, x, embedding, context):
        b, c, *_ = x.shape
        d = c // self.heads
        qkv = self.qkv(self.norm(x).reshape(b, c, -1))
        out = []
        for head in range(self.heads):
            if self.new_order:
                starts = [head * d, c + head * d, 2 * c + head * d]
            else:
                starts = [3 * d * head, 3 * d * head + d, 3 * d * head + 2 * d]
            q, k, v = (qkv[:, s : s + d].transpose(1, 2) for s in starts)
            out.append(attention(q, k, v).transpose(1, 2))
        return x + self.proj_out(torch.cat(out, dim=1)).reshape(x.shape)


class TokenAttention(nn.Module):
    def __init__(self, c, context, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(c, c, bias=False)
        self.to_k = nn.Linear(context, c, bias=False)
        self.to_v = nn.Linear(context, c, bias=False)
        self.to_out = nn.Sequential(nn.Linear(c, c), nn.Dropout(0.0))

    def forward(self, x, context):
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        parts = zip(*(a.chunk(self.heads, dim=-1) for a in (q, k, v)), strict=True)
        return self.to_out(torch.cat([attention(*part) for part in parts], dim=-1))


class Gated(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.proj = nn.Linear(c, 8 * c)

    def forward(self, x):
        h, gate = self.proj(x).chunk(2, dim=-1)
        return h * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.net = nn.Sequential(Gated(c), nn.Dropout(0.0), nn.Linear(4 * c, c))

    def forward(self, x):
        return self.net(x)


class Block(nn.Module):
    def __init__(self, c, context, heads):
        super().__init__()
        self.attn1 = TokenAttention(c, c, heads)
        self.ff = FeedForward(c)
        self.attn2 = TokenAttention(c, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))

    def forward(self, x, context):
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    def __init__(self, c, context, heads, groups, depth):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1)
        self.transformer_blocks = nn.ModuleList(Block(c, context, heads) for _ in range(depth))

    def forward(self, x, embedding, context):
        b, c, height, width = x.shape
        h = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h.transpose(1, 2).reshape(b, c, height, width))


class Strided(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.op = nn.Conv2d(c, c, 3, stride=2, padding=1)

    def forward(self, x, embedding, context):
        return self.op(x)


class Enlarged(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x, embedding, context):
        return self.conv(F.interpolate(x, scale_factor=2, mode='nearest'))


class First(nn.Conv2d):
    def forward(self, x, embedding, context):
        return super().forward(x)


def sinusoids(t, width):
    """Cosines first, frequencies 10000^(-i / half): no shift."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class NumberedUNet(nn.Module):
    """`channels` of every level; `heads` a function of a width; `attend_at` the levels with it."""

    def __init__(
        self, channels, *, width, in_channels, out_channels, blocks, attend_at, heads, groups,
        classes=None, context=None, depth=1, updown=False,
        scale_shift=False, new_order=False,
    ):  # fmt: skip
        super().__init__()
        self.width = width
        e = 4 * width

        def residual(c_in, c_out, resample=None):
            return Residual(c_in, c_out, e, groups, scale_shift, resample)

        def attend(c):
            if context is None:
                return PixelAttention(c, heads(c), groups, new_order)
            return Transformer(c, context, heads(c), groups, depth)

        self.time_embed = nn.Sequential(nn.Linear(width, e), nn.SiLU(), nn.Linear(e, e))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, e)
        c = channels[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(in_channels, c, 3, padding=1)])])
        skips = [c]
        for level, c_out in enumerate(channels):
            for _ in range(blocks):
                layers = [residual(c, c_out)]
                layers += [attend(c_out)] if level in attend_at else []
                self.input_blocks.append(nn.ModuleList(layers))
                c = c_out
                skips.append(c)
            if level < len(channels) - 1:
                layer = residual(c, c, 'down') if updown else Strided(c)
                self.input_blocks.append(nn.ModuleList([layer]))
                skips.append(c)
        self.middle_block = nn.ModuleList([residual(c, c), attend(c), residual(c, c)])
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for j in range(blocks + 1):
                layers = [residual(c + skips.pop(), channels[level])]
                c = channels[level]
                layers += [attend(c)] if level in attend_at else []
                if level and j == blocks:
                    layers.append(residual(c, c, 'up') if updown else Enlarged(c))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c, 1e-5), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1)
        )

    def forward(self, x, t, y=None, context=None, low_res=None):
        if low_res is not None:
            large = F.interpolate(low_res, x.shape[2:], mode='bilinear')
            x = torch.cat([x, large], dim=1)
        embedding = self.time_embed(sinusoids(t, self.width))
        if y is not None:
            embedding = embedding + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            for layer in block:
                x = layer(x, embedding, context)
            skips.append(x)
        for layer in self.middle_block:
            x = layer(x, embedding, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for layer in block:
                x = layer(x, embedding, context)
        return self.out(x)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with norms, biases and tables that are not what a fresh one has."""
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                shift = 1.0 if 'weight' in name else 0.0
                parameter.copy_(shift + 0.3 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module.eval()


def state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def predict(module: nn.Module, x: np.ndarray, t: np.ndarray, **named: np.ndarray) -> np.ndarray:
    """The output for NHWC images, NHWC; `low_res` too is NHWC."""
    to_torch = lambda a: torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2)))  # noqa: E731
    given = {name: to_torch(a) if a.ndim == 4 else torch.from_numpy(a) for name, a in named.items()}
    with torch.no_grad():
        return module(to_torch(x), torch.from_numpy(t), **given).numpy().transpose(0, 2, 3, 1)
