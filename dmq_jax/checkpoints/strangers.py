"""Files that people take for a network's weights and that are none, or none that is known here.

They are told by the first bytes, or by the names of their tensors, and refused with what they are
and what to give instead.
"""

import re
from collections.abc import Iterable

# First bytes -> what such a file is, and what to do.
_BEGINNINGS = (
    (b'version https://git-lfs', 'a pointer of Git LFS in place of the file; run git lfs pull'),
    (b'<', 'a web page; the download went wrong, so download the file again'),
    (b'GGUF', 'a GGUF file, which is quantized already; give the float network'),
    (b'\x89HDF', 'an HDF5 file of Keras; give the weights as .safetensors or of torch'),
)
# Pattern that the name of a tensor matches -> what such a file is, and what to do; the first wins.
_NAMES = (
    (
        r'\blora_|[._]lora[._]|\bhada_w|\blokr_',
        'a LoRA, a change of a network rather than a network; give the network that it was made '
        'for, or one that it was merged into',
    ),
    (
        r'(^|\.)control_model\.|^controlnet_',
        'a ControlNet, which steers a network; give the network itself',
    ),
    (
        r'weight_quantizer|\.qweight$|\.wscales$|\.SCB$|\.weight\.absmax$',
        'a network that is quantized already; give the float one',
    ),
    (
        r'\bdouble_blocks\.0\.|^single_transformer_blocks\.',
        'Flux, a network that is not known here',
    ),
    (r'\bjoint_blocks\.0\.', 'Stable Diffusion 3, a network that is not known here'),
    (r'^string_to_param|^emb_params$', 'a textual inversion, words rather than a network'),
    (
        r'^(first_stage_model\.|vae\.)?decoder\.conv_in\.weight$',
        'an autoencoder alone; give the network that makes its latents as teacher.path, and the '
        'folder of the autoencoder as teacher.components where that one lacks it',
    ),
    (
        r'^text_model\.encoder\.|^encoder\.block\.0\.layer\.0\.',
        'a text encoder; give the network that it serves, and the folder with text_encoder/ as '
        'teacher.components where that one lacks it',
    ),
)


def by_beginning(head: bytes) -> str | None:
    """What a file with these first bytes is, if it is known to be no checkpoint."""
    return next((what for begin, what in _BEGINNINGS if head.startswith(begin)), None)


def by_names(names: Iterable[str]) -> str | None:
    """What a file with these tensors is, if it is known to be no network of ours."""
    text = list(names)
    for pattern, what in _NAMES:
        if any(re.search(pattern, name) for name in text):
            return what
    return None


def check_channels(in_channels: int, out_channels: int | None) -> None:
    """Refuses a network that is given more channels than it denoises.

    Args:
      in_channels: of what it is given.
      out_channels: of its prediction, which may hold a variance besides; None: as many.

    Raises:
      ValueError: as said.
    """
    if out_channels not in (None, in_channels, 2 * in_channels):
        raise ValueError(
            f'in_channels={in_channels}, out_channels={out_channels}: expected as many channels '
            f'out as in, or twice as many. A network that is given an image besides x_t '
            f'(inpainting, depth, editing) is not supported; give the one it was made from.'
        )


def refiner() -> ValueError:
    """The error for the second network of SDXL."""
    return ValueError(
        'this is the refiner of SDXL, which goes on from the latents of the base network and is '
        'not supported; give the base network.'
    )
