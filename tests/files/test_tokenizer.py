import json
import sys

import numpy as np
import pytest

from dmq_jax.files.tokenizer import open_tokenizer

END, START = '<|endoftext|>', '<|startoftext|>'
# Of CLIP's kind: letters, letters that end a word, and what merges make of them.
VOCABULARY = [
    'a', 'c', 't', 'o', '1', '!', 'a</w>', 'c</w>', 't</w>', 'o</w>', '1</w>', '!</w>', "'s</w>",
    "'", 's', 's</w>', 'at</w>', 'cat</w>', 'ca', START, END,
]  # fmt: skip
MERGES = ["' s</w>", 'a t</w>', 'c at</w>', 'c a']
ID = {token: index for index, token in enumerate(VOCABULARY)}


def write_clip(folder, **settings):
    (folder / 'vocab.json').write_text(json.dumps(ID))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *MERGES, '']))
    if settings:
        (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


def ids(*tokens):
    return [ID[token] for token in tokens]


@pytest.fixture
def clip(tmp_path):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    return open_tokenizer(write_clip(tmp_path))


@pytest.mark.parametrize(
    'text, tokens',
    [
        ('cat', ['cat</w>']),
        ('  A\n CAT ', ['a</w>', 'cat</w>']),
        ("cat's", ['cat</w>', "'s</w>"]),
        ('cat11!', ['cat</w>', '1</w>', '1</w>', '!</w>']),
        ('cao', ['ca', 'o</w>']),
        ('', []),
    ],
)
def test_a_text_becomes_the_tokens_of_clip(clip, text, tokens):
    out = clip([text], 8)
    wanted = ids(START, *tokens, END)
    assert out.ids.dtype == out.mask.dtype == np.int32
    assert out.ids[0, : len(wanted)].tolist() == wanted
    assert set(out.ids[0, len(wanted) :].tolist()) == {ID[END]}
    assert out.mask[0].tolist() == [1] * len(wanted) + [0] * (8 - len(wanted))


def test_a_long_text_is_cut_and_keeps_its_end(clip):
    out = clip(['a a a a a a', 'cat'], 4)
    assert out.ids.tolist() == [
        ids(START, 'a</w>', 'a</w>', END),
        ids(START, 'cat</w>', END, END),
    ]
    assert out.is_cut.tolist() == [True, False]


def test_no_texts_are_no_tokens(clip):
    assert clip([], 5).ids.shape == (0, 5)


@pytest.mark.parametrize('pad_token', ['!', {'content': '!', 'lstrip': False}])
def test_padding_is_what_the_settings_say(tmp_path, pad_token):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    tokenizer = open_tokenizer(write_clip(tmp_path, pad_token=pad_token))
    assert tokenizer(['cat'], 5).ids[0].tolist() == ids(START, 'cat</w>', END, '!', '!')


def test_a_tokenizer_json_comes_first_and_says_the_same(tmp_path):
    tokenizers = pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<pad>': 0, 'cat': 1, 'x': 2}, 'x'))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / 'tokenizer.json'))
    write_clip(tmp_path, pad_token='<pad>')
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.path.name == 'tokenizer.json'
    out = tokenizer(['cat dog'], 4)
    assert (out.ids.tolist(), out.mask.tolist()) == ([[1, 2, 0, 0]], [[1, 1, 0, 0]])


def test_sentencepiece_models_end_and_pad_as_t5_does(tmp_path):
    sentencepiece = pytest.importorskip('sentencepiece', reason='reads the vocabulary of T5')
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(['a cat sat on a mat', 'the cat'] * 20),
        model_prefix=str(tmp_path / 'spiece'), vocab_size=25, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    tokenizer = open_tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'spiece.model'))
    out = tokenizer(['a cat', 'a cat sat on a mat ' * 9, ''], 12)
    first = [*processor.EncodeAsIds('a cat'), 1]
    assert out.ids[0].tolist() == first + [0] * (12 - len(first))
    assert out.mask.sum(1).tolist() == [len(first), 12, 1]
    assert out.ids[1, -1] == 1 and 1 not in out.ids[1, :-1]
    assert out.ids[2].tolist() == [1] + [0] * 11
    assert out.is_cut.tolist() == [False, True, False]


@pytest.mark.parametrize('present', [[], ['vocab.json'], ['merges.txt']])
def test_missing_files_are_named(tmp_path, present):
    for name in present:
        (tmp_path / name).write_text('{}')
    with pytest.raises(FileNotFoundError, match='expected tokenizer.json, or vocab.json and') as e:
        open_tokenizer(tmp_path)
    for name in present:
        assert f'{name} alone is not enough' in str(e.value)


@pytest.mark.parametrize(
    'name, package',
    [('tokenizer.json', 'tokenizers'), ('vocab.json', 'tokenizers'), ('spiece.model', 'sentencep')],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    monkeypatch.setitem(sys.modules, 'sentencepiece', None)
    if name == 'vocab.json':
        write_clip(tmp_path)
    else:
        (tmp_path / name).write_text('{}')
    with pytest.raises(ImportError, match=f"{name}: reading it needs the package '{package}"):
        open_tokenizer(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path):
    pytest.importorskip('tokenizers', reason='reads the vocabulary of CLIP')
    write_clip(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('no')
    with pytest.raises(ValueError, match='tokenizer_config.json: not a JSON file'):
        open_tokenizer(tmp_path)
    (tmp_path / 'tokenizer_config.json').write_text('{"pad_token": "<none>"}')
    with pytest.raises(ValueError, match="token for padding is '<none>'"):
        open_tokenizer(tmp_path)
    (tmp_path / 'vocab.json').write_text('{"a": 0}')
    (tmp_path / 'merges.txt').write_text('#version: 0.2\n')
    with pytest.raises(ValueError, match=r"lacks '<\|startoftext\|>'; is it that of CLIP"):
        open_tokenizer(tmp_path)
    (tmp_path / 'vocab.json').write_text('[]')
    with pytest.raises(ValueError, match='vocab.json: not a vocabulary with merges'):
        open_tokenizer(tmp_path)
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(ValueError, match='tokenizer.json: not a tokenizer.json'):
        open_tokenizer(tmp_path)


def test_a_damaged_sentencepiece_model_is_refused_by_name(tmp_path):
    pytest.importorskip('sentencepiece', reason='reads the vocabulary of T5')
    (tmp_path / 'spiece.model').write_bytes(b'no')
    with pytest.raises(ValueError, match='spiece.model: not a model of sentencepiece'):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    'texts, length, text', [('cat', 5, 'expected a sequence of texts'), (['cat'], 2, 'length=2')]
)
def test_what_is_no_list_of_texts_is_refused(clip, texts, length, text):
    with pytest.raises(ValueError, match=text):
        clip(texts, length)
