"""Transformers of diffusers with random weights, and the original DiT and PixArt in plain torch.

Images go in and come out as NumPy arrays in NHWC.
"""

import numpy as np
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from torch.nn import functional as F

DIT = {
    'num_attention_heads': 2,
    'attention_head_dim': 12,
    'in_channels': 3,
    'out_channels': 6,
    'num_layers': 2,
    'sample_size': 8,
    'patch_size': 2,
    'num_embeds_ada_norm': 5,
    'norm_type': 'ada_norm_zero',
    'norm_elementwise_affine': False,
    'activation_fn': 'gelu-approximate',
    'norm_eps': 1e-5,
}
PIXART = {
    'num_attention_heads': 2,
    'attention_head_dim': 12,
    'in_channels': 3,
    'out_channels': 6,
    'num_layers': 2,
    'cross_attention_dim': 24,
    'sample_size': 8,
    'patch_size': 2,
    'interpolation_scale': 2,
    'use_additional_conditions': True,
    'caption_channels': 10,
}


def random_dit(config: dict = DIT, *, shared_embedding: bool = True) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**config).eval()
    if shared_embedding:
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return model


def random_pixart(config: dict = PIXART) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**config).eval()


def state(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def predict_dit(model: DiTTransformer2DModel, x, t, y) -> np.ndarray:
    with torch.no_grad():
        out = model(to_torch(x), torch.from_numpy(t), class_labels=torch.from_numpy(y)).sample
    return out.numpy().transpose(0, 2, 3, 1)


def predict_pixart(
    model: PixArtTransformer2DModel, x, t, text, mask=None, resolution=None, aspect_ratio=None
) -> np.ndarray:
    conditions = {'resolution': None, 'aspect_ratio': None}
    if resolution is not None:
        conditions = {
            'resolution': torch.from_numpy(resolution),
            'aspect_ratio': torch.from_numpy(aspect_ratio)[:, None],
        }
    with torch.no_grad():
        out = model(
            to_torch(x),
            encoder_hidden_states=torch.from_numpy(text),
            timestep=torch.from_numpy(t),
            added_cond_kwargs=conditions,
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
        ).sample
    return out.numpy().transpose(0, 2, 3, 1)


# ---- The original layouts: names and formulas of the papers and of the checkpoints


def random_original(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Matrices keep the size of what they multiply, about; vectors are far from 0."""
    rng = np.random.default_rng(seed)
    return {
        name: (max(np.prod(shape[1:]), 4) ** -0.5 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def sinusoids(values: torch.Tensor) -> torch.Tensor:
    """256 features, cosines first, frequencies from 1 to just above 1/10000, in float64."""
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = values.double()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def positions(rows: int, columns: int, width: int, base: int, scale: float) -> torch.Tensor:
    """[L, D] in float64; the column fills the first half."""
    table = torch.zeros(rows, columns, width, dtype=torch.float64)
    quarter = width // 4
    for i in range(rows):
        for j in range(columns):
            for part, place in enumerate([j * base / columns / scale, i * base / rows / scale]):
                for k in range(quarter):
                    angle = torch.tensor(place / 10000 ** (k / quarter), dtype=torch.float64)
                    table[i, j, 2 * part * quarter + k] = angle.sin()
                    table[i, j, (2 * part + 1) * quarter + k] = angle.cos()
    return table.reshape(rows * columns, width)


class Original:
    """Evaluates a state dict of the original code in float64."""

    def __init__(self, tensors: dict[str, np.ndarray], num_heads: int):
        self.tensors = {name: torch.from_numpy(x).double() for name, x in tensors.items()}
        self.num_heads = num_heads

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.tensors[f'{name}.weight'], self.tensors[f'{name}.bias'])

    def mlp(self, first: str, second: str, x: torch.Tensor, act) -> torch.Tensor:
        return self.linear(second, act(self.linear(first, x)))

    def embed(self, name: str, values: torch.Tensor) -> torch.Tensor:
        return self.mlp(f'{name}.mlp.0', f'{name}.mlp.2', sinusoids(values), F.silu)

    def attend(self, q, k, v, mask=None) -> torch.Tensor:
        b, length, width = q.shape
        q, k, v = (x.reshape(b, x.shape[1], self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(2, 3) / (width // self.num_heads) ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, length, width)

    def self_attention(self, block: str, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear(f'{block}.attn.qkv', x).chunk(3, dim=-1)
        return self.linear(f'{block}.attn.proj', self.attend(q, k, v))

    def cross_attention(self, block: str, x, text, mask) -> torch.Tensor:
        q = self.linear(f'{block}.cross_attn.q_linear', x)
        k, v = self.linear(f'{block}.cross_attn.kv_linear', text).chunk(2, dim=-1)
        return self.linear(f'{block}.cross_attn.proj', self.attend(q, k, v, mask))

    def patches(self, x: np.ndarray, base: int, scale: float) -> torch.Tensor:
        weight, bias = self.tensors['x_embedder.proj.weight'], self.tensors['x_embedder.proj.bias']
        h = F.conv2d(to_torch(x).double(), weight, bias, stride=weight.shape[-1])
        rows, columns = h.shape[2:]
        return h.flatten(2).transpose(1, 2) + positions(rows, columns, h.shape[1], base, scale)

    def image(self, h: torch.Tensor, x: np.ndarray) -> np.ndarray:
        size = self.tensors['x_embedder.proj.weight'].shape[-1]
        rows, columns = x.shape[1] // size, x.shape[2] // size
        h = h.reshape(h.shape[0], rows, columns, size, size, -1)
        return h.permute(0, 1, 3, 2, 4, 5).reshape(h.shape[0], *x.shape[1:3], -1).numpy()

    def dit(self, x, t, y, base: int) -> np.ndarray:
        h = self.patches(x, base, 1.0)
        c = self.embed('t_embedder', torch.from_numpy(t))
        c = F.silu(c + self.tensors['y_embedder.embedding_table.weight'][torch.from_numpy(y)])
        count = len({name.split('.')[1] for name in self.tensors if name.startswith('blocks.')})
        for block in (f'blocks.{i}' for i in range(count)):
            rows = self.linear(f'{block}.adaLN_modulation.1', c)[:, None].chunk(6, dim=-1)
            h = h + rows[2] * self.self_attention(block, modulate(h, rows[0], rows[1]))
            m = modulate(h, rows[3], rows[4])
            h = h + rows[5] * self.mlp(f'{block}.mlp.fc1', f'{block}.mlp.fc2', m, gelu)
        shift, scale = self.linear('final_layer.adaLN_modulation.1', c)[:, None].chunk(2, dim=-1)
        return self.image(self.linear('final_layer.linear', modulate(h, shift, scale)), x)

    def pixart(self, x, t, text, mask, base: int, position_scale: float, sizes=None) -> np.ndarray:
        h = self.patches(x, base, position_scale)
        c = self.embed('t_embedder', torch.from_numpy(t))
        if sizes is not None:
            resolution, ratio = map(torch.from_numpy, sizes)
            more = [self.embed('csize_embedder', resolution[:, i]) for i in range(2)]
            c = c + torch.cat([*more, self.embed('ar_embedder', ratio)], dim=1)
        text = torch.from_numpy(text).double()
        text = self.mlp('y_embedder.y_proj.fc1', 'y_embedder.y_proj.fc2', text, gelu)
        mask = torch.from_numpy(mask).bool()
        shared = self.linear('t_block.1', F.silu(c)).reshape(len(x), 6, -1)
        count = len({name.split('.')[1] for name in self.tensors if name.startswith('blocks.')})
        for block in (f'blocks.{i}' for i in range(count)):
            rows = (self.tensors[f'{block}.scale_shift_table'] + shared).chunk(6, dim=1)
            h = h + rows[2] * self.self_attention(block, modulate(h, rows[0], rows[1]))
            h = h + self.cross_attention(block, h, text, mask)
            m = modulate(h, rows[3], rows[4])
            h = h + rows[5] * self.mlp(f'{block}.mlp.fc1', f'{block}.mlp.fc2', m, gelu)
        table = self.tensors['final_layer.scale_shift_table'] + c[:, None]
        shift, scale = table.chunk(2, dim=1)
        return self.image(self.linear('final_layer.linear', modulate(h, shift, scale)), x)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate='tanh')
