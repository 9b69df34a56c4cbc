"""CLIP's text encoder and T5's encoder in plain torch, float64, from the names of checkpoints."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices keep the size of what they multiply, about; norms are about 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = max(np.prod(shape[1:]), 4) ** -0.5 * rng.standard_normal(shape)
        is_norm = ('norm' in name or 'ln_' in name) and name.endswith('weight')
        tensors[name] = (values + is_norm).astype(np.float32)
    return tensors


ACTIVATIONS = {'quick_gelu': lambda x: x * torch.sigmoid(1.702 * x), 'gelu': F.gelu}


class Names:
    """Tensors of a state dict, float64."""

    def __init__(self, tensors: dict[str, np.ndarray]):
        self.tensors = {name: torch.from_numpy(x).double() for name, x in tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self[f'{name}.weight'], self.tensors.get(f'{name}.bias'))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self[f'{name}.weight'], self[f'{name}.bias'], 1e-5)

    def count(self, prefix: str) -> int:
        rest = (name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix))
        return len({name.split('.')[0] for name in rest})


def causal_attention(x: torch.Tensor, fused: tuple, out: tuple, num_heads: int) -> torch.Tensor:
    """Torch's own module; `fused` and `out` are weight and bias."""
    module = nn.MultiheadAttention(x.shape[-1], num_heads, batch_first=True).double().eval()
    names = ('in_proj_weight', 'in_proj_bias', 'out_proj.weight', 'out_proj.bias')
    module.load_state_dict(dict(zip(names, (*fused, *out), strict=True)))
    mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return module(x, x, x, attn_mask=mask, need_weights=False)[0]


@torch.no_grad()
def clip(tensors: dict, tokens: np.ndarray, num_heads: int, activation: str) -> list[np.ndarray]:
    """Hidden states of transformers' layout, the embedding first; then the normalized last one."""
    names = Names(tensors)
    index = torch.from_numpy(tokens).long()
    prefix = 'text_model.'
    positions = names[f'{prefix}embeddings.position_embedding.weight'][: index.shape[1]]
    h = names[f'{prefix}embeddings.token_embedding.weight'][index] + positions
    states = [h]
    for i in range(names.count(f'{prefix}encoder.layers.')):
        layer = f'{prefix}encoder.layers.{i}'
        fused = [
            torch.cat([names[f'{layer}.self_attn.{x}_proj.{leaf}'] for x in 'qkv'])
            for leaf in ('weight', 'bias')
        ]
        out = [names[f'{layer}.self_attn.out_proj.{leaf}'] for leaf in ('weight', 'bias')]
        h = h + causal_attention(names.norm(f'{layer}.layer_norm1', h), fused, out, num_heads)
        inner = ACTIVATIONS[activation](
            names.linear(f'{layer}.mlp.fc1', names.norm(f'{layer}.layer_norm2', h))
        )
        h = h + names.linear(f'{layer}.mlp.fc2', inner)
        states.append(h)
    states.append(names.norm(f'{prefix}final_layer_norm', h))
    return [state.numpy() for state in states]


@torch.no_grad()
def open_clip(tensors: dict, tokens: np.ndarray, num_heads: int, layers: int) -> dict:
    """The first `layers` blocks of open_clip's layout: normalized, before the last, pooled."""
    names = Names(tensors)
    index = torch.from_numpy(tokens).long()
    h = names['token_embedding.weight'][index] + names['positional_embedding'][: index.shape[1]]
    for i in range(layers):
        before, block = h, f'transformer.resblocks.{i}'
        fused = [names[f'{block}.attn.in_proj_{leaf}'] for leaf in ('weight', 'bias')]
        out = [names[f'{block}.attn.out_proj.{leaf}'] for leaf in ('weight', 'bias')]
        h = h + causal_attention(names.norm(f'{block}.ln_1', h), fused, out, num_heads)
        inner = F.gelu(names.linear(f'{block}.mlp.c_fc', names.norm(f'{block}.ln_2', h)))
        h = h + names.linear(f'{block}.mlp.c_proj', inner)
    last = names.norm('ln_final', h)
    pooled = last[torch.arange(len(index)), index.argmax(-1)] @ names['text_projection']
    return {'last': last.numpy(), 'penultimate': before.numpy(), 'pooled': pooled.numpy()}


def distance_bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    """Class of `distance` = position of the other token - position of this one."""
    half = num_buckets // 2
    offset, size = (half if distance > 0 else 0), abs(distance)
    exact = half // 2
    if size < exact:
        return offset + size
    grown = torch.tensor(size).float().div(exact).log() / math.log(max_distance / exact)
    return offset + min(half - 1, exact + int(grown * (half - exact)))


@torch.no_grad()
def t5(
    tensors: dict, tokens: np.ndarray, mask: np.ndarray, *, num_heads: int, num_buckets: int,
    max_distance: int,
) -> np.ndarray:  # fmt: skip
    names = Names(tensors)
    index = torch.from_numpy(tokens).long()
    length = index.shape[1]
    first = 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
    bias = torch.stack(
        [
            torch.stack(
                [names[first][distance_bucket(j - i, num_buckets, max_distance)]
                 for j in range(length)]
            )
            for i in range(length)
        ]
    ).permute(2, 0, 1)  # fmt: skip

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * names[f'{name}.weight']

    def heads(name: str, x: torch.Tensor) -> torch.Tensor:
        return names.linear(name, x).reshape(len(x), length, num_heads, -1).transpose(1, 2)

    h = names['shared.weight'][index]
    for i in range(names.count('encoder.block.')):
        attention = f'encoder.block.{i}.layer.0.SelfAttention'
        x = norm(f'encoder.block.{i}.layer.0.layer_norm', h)
        q, k, v = (heads(f'{attention}.{name}', x) for name in 'qkv')
        scores = (q @ k.transpose(2, 3) + bias).masked_fill(
            torch.from_numpy(mask == 0)[:, None, None, :], -torch.inf
        )
        x = (scores.softmax(-1) @ v).transpose(1, 2).reshape(len(h), length, -1)
        h = h + names.linear(f'{attention}.o', x)
        dense = f'encoder.block.{i}.layer.1.DenseReluDense'
        x = norm(f'encoder.block.{i}.layer.1.layer_norm', h)
        gate = F.gelu(names.linear(f'{dense}.wi_0', x), approximate='tanh')
        h = h + names.linear(f'{dense}.wo', gate * names.linear(f'{dense}.wi_1', x))
    return norm('encoder.final_layer_norm', h).numpy()
