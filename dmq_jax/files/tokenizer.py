"""Texts as the tokens of a text encoder, from the vocabulary that lies beside its weights.

The work is done by the libraries that made the vocabularies, which are imported when they are
needed: `tokenizers` for `tokenizer.json` and for CLIP's `vocab.json` with `merges.txt`,
`sentencepiece` for T5's `spiece.model`.
"""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# The tokens of CLIP (Radford et al. 2021); T5's are in its `spiece.model`.
_CLIP_START, _CLIP_END = '<|startoftext|>', '<|endoftext|>'
# Words, contractions, digits one by one, and runs of everything else: CLIP's rule.
_CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r'|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+'
)


class Tokens(NamedTuple):
    """Texts of one length.

    Attributes:
      ids: rows of the encoder's table, int32 [N, L], the marks of start and end included.
      mask: 1 where there is a token, 0 where there is padding, int32 [N, L].
      is_cut: whether a text had more tokens, which are gone, bool [N].
    """

    ids: np.ndarray
    mask: np.ndarray
    is_cut: np.ndarray


class Tokenizer:
    """Texts to tokens.

    Attributes:
      path: the file of the vocabulary.
    """

    def __init__(self, path: Path, encode: Callable[[Sequence[str], int], Tokens]):
        self.path = path
        self._encode = encode

    def __call__(self, texts: Sequence[str], length: int) -> Tokens:
        """The tokens of `texts`, each cut or padded to `length`, its mark of the end kept.

        Args:
          texts: any number of them.
          length: 77 for CLIP, 120 for PixArt-alpha, 300 for PixArt-Sigma.

        Raises:
          ValueError: a single string, or a length without room for a token.
        """
        if isinstance(texts, str):
            raise ValueError(f'texts={texts!r:.60}: expected a sequence of texts, not one text.')
        if length < 3:
            raise ValueError(f'length={length}: expected 3 or more.')
        return self._encode(texts, length)


def open_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer whose files lie in `folder` (`tokenizer/` of a diffusers checkpoint).

    The first of `tokenizer.json`, `vocab.json` with `merges.txt`, and `spiece.model` is taken.
    Padding is done with the token that `special_tokens_map.json` or `tokenizer_config.json` names,
    which differs among CLIP's: the end of the text in Stable Diffusion 1, '!' in Stable Diffusion 2
    and in the second encoder of SDXL.

    Raises:
      FileNotFoundError: none of these files.
      ImportError: the library that reads them is not installed; it says which.
      ValueError: a file that is no such vocabulary.
    """
    folder = Path(folder)
    if (folder / 'tokenizer.json').is_file():
        return _from_json(folder)
    found = [name for name in ('vocab.json', 'merges.txt') if (folder / name).is_file()]
    if len(found) == 2:
        return _from_merges(folder)
    if (folder / 'spiece.model').is_file():
        return _from_sentencepiece(folder / 'spiece.model')
    beside = f'; {found[0]} alone is not enough' if found else ''
    raise FileNotFoundError(
        f'{folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt, or '
        f'spiece.model{beside}.'
    )


def _library(name: str, file: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{file}: reading it needs the package {name!r}, which is not installed; '
            f'`pip install {name}`.'
        ) from error


def _from_json(folder: Path) -> Tokenizer:
    path = folder / 'tokenizer.json'
    tokenizers = _library('tokenizers', path)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f'{path}: not a tokenizer.json ({error}).') from error
    padding = tokenizer.padding or {}
    return _with_padding(tokenizer, path, _pad_token(folder, padding.get('pad_token')))


def _from_merges(folder: Path) -> Tokenizer:
    path = folder / 'vocab.json'
    tokenizers = _library('tokenizers', path)
    try:
        model = tokenizers.models.BPE.from_file(
            str(path), str(folder / 'merges.txt'), end_of_word_suffix='</w>', unk_token=_CLIP_END
        )
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f'{path}: not a vocabulary with merges ({error}).') from error
    tokenizer = tokenizers.Tokenizer(model)
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
            normalizers.Lowercase(),
        ]
    )
    words = tokenizers.Regex(_CLIP_WORDS)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior='removed', invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    marks = {token: tokenizer.token_to_id(token) for token in (_CLIP_START, _CLIP_END)}
    if missing := [token for token, index in marks.items() if index is None]:
        raise ValueError(f'{path}: the vocabulary lacks {missing[0]!r}; is it that of CLIP?')
    tokenizer.add_special_tokens(list(marks))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'{_CLIP_START} $A {_CLIP_END}', special_tokens=list(marks.items())
    )
    return _with_padding(tokenizer, path, _pad_token(folder, _CLIP_END))


def _pad_token(folder: Path, otherwise: str | None) -> str | None:
    for name in ('special_tokens_map.json', 'tokenizer_config.json'):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text(encoding='utf-8')).get('pad_token')
        except (ValueError, AttributeError) as error:
            raise ValueError(f'{path}: not a JSON file of settings ({error}).') from error
        token = token.get('content') if isinstance(token, dict) else token
        if token is not None:
            return token
    return otherwise


def _with_padding(tokenizer: Any, path: Path, pad_token: str | None) -> Tokenizer:
    pad_id = None if pad_token is None else tokenizer.token_to_id(pad_token)
    if pad_id is None:
        raise ValueError(
            f'{path}: the token for padding is {pad_token!r}, which is not in the vocabulary; '
            f'name one as pad_token in tokenizer_config.json beside it.'
        )

    def encode(texts: Sequence[str], length: int) -> Tokens:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=pad_token)
        rows = tokenizer.encode_batch(list(texts))
        ids = np.array([row.ids for row in rows], np.int32)
        mask = np.array([row.attention_mask for row in rows], np.int32)
        is_cut = np.array([bool(row.overflowing) for row in rows], bool)
        return Tokens(ids.reshape(-1, length), mask.reshape(-1, length), is_cut)

    return Tokenizer(path, encode)


def _from_sentencepiece(path: Path) -> Tokenizer:
    sentencepiece = _library('sentencepiece', path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.Load(str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f'{path}: not a model of sentencepiece ({error}).') from error
    pad_id, end_id = processor.pad_id(), processor.eos_id()
    if min(pad_id, end_id) < 0:
        raise ValueError(f'{path}: the model has no padding or no end; is it that of T5?')

    def encode(texts: Sequence[str], length: int) -> Tokens:
        ids = np.full((len(texts), length), pad_id, np.int32)
        mask = np.zeros_like(ids)
        is_cut = np.zeros(len(texts), bool)
        for i, text in enumerate(texts):
            found = processor.EncodeAsIds(text)
            row = [*found[: length - 1], end_id]
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            is_cut[i] = len(found) > length - 1
        return Tokens(ids, mask, is_cut)

    return Tokenizer(path, encode)
