import tracemalloc
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from dmq_jax.models import torch_weights
from dmq_jax.models.torch_weights import (
    Source,
    choose,
    expected_tensors,
    parameter_shapes,
    read_params,
    read_settings,
    rename,
    without_old_attention,
    without_prefix,
    write_tensors,
)


class Network(nn.Module):
    """One layer of every kind, the last two stored as one tensor."""

    heads: int = 1

    @nn.compact
    def __call__(self, x, y):
        x = nn.Conv(6, (3, 2), name='conv')(x)
        x = nn.LayerNorm(name='norm')(x).mean((1, 2)) + nn.Embed(3, 6, name='table')(y)
        return (
            nn.Dense(4, name='a')(x)
            + nn.Dense(4, name='b')(x)
            + self.param('temperature', nn.initializers.ones, ())
        )


TABLE = (('conv', 'first'), ('norm', 'then.0'), ('table', 'then.1'))
IMAGE = jax.ShapeDtypeStruct((1, 4, 4, 5), jnp.float32)
SHAPES = parameter_shapes(Network(), IMAGE, jax.ShapeDtypeStruct((1,), jnp.int32))


def source(path, heads=1):
    module, _, leaf = path.rpartition('/')
    if module in ('a', 'b'):
        name = f'fused.{"bias" if leaf == "bias" else "weight"}'
        return Source(name, part='ab'.index(module), parts=2, heads=heads)
    return Source(rename(path, TABLE)) if module else Source(path)


def random_params():
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), SHAPES)


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_expected_tensors_are_in_the_order_of_torch():
    assert expected_tensors(SHAPES, source) == {
        'first.weight': (6, 5, 3, 2),
        'first.bias': (6,),
        'then.0.weight': (6,),
        'then.0.bias': (6,),
        'then.1.weight': (3, 6),
        'fused.weight': (8, 6),
        'fused.bias': (8,),
        'temperature': (),
    }


def test_every_number_goes_where_torch_had_it():
    params = random_params()
    tensors = write_tensors(params, source)
    assert tensors['first.weight'][4, 3, 2, 1] == params['conv']['kernel'][2, 1, 3, 4]
    assert tensors['fused.weight'][4 + 3, 5] == params['b']['kernel'][5, 3]
    np.testing.assert_array_equal(tensors['then.0.weight'], params['norm']['scale'])
    np.testing.assert_array_equal(tensors['then.1.weight'], params['table']['embedding'])


@pytest.mark.parametrize('heads', [1, 2, 4])
def test_writing_undoes_reading(heads):
    params = random_params()
    tensors = write_tensors(params, lambda path: source(path, heads))
    assert_same_tree(read_params(tensors, SHAPES, lambda path: source(path, heads)), params)


def test_a_fused_tensor_is_divided_by_heads_first():
    tensors = write_tensors(random_params(), source)
    tensors['fused.bias'] = np.arange(8, dtype=np.float32)
    params = read_params(tensors, SHAPES, lambda path: source(path, 2))
    np.testing.assert_array_equal(params['a']['bias'], [0, 1, 4, 5])
    np.testing.assert_array_equal(params['b']['bias'], [2, 3, 6, 7])


def test_a_kernel_stored_as_flax_has_it_is_not_transposed():
    kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
    shapes = {'out': {'kernel': jax.ShapeDtypeStruct((3, 4), jnp.float32)}}
    params = read_params({'w': kernel}, shapes, lambda path: Source('w', transposed=False))
    np.testing.assert_array_equal(params['out']['kernel'], kernel)


@pytest.mark.parametrize('ones', [(), (1,), (1, 1)])
def test_a_pointwise_convolution_is_a_dense_layer(ones):
    params = random_params()
    tensors = write_tensors(params, source)
    tensors['fused.weight'] = tensors['fused.weight'].reshape(8, 6, *ones)
    assert_same_tree(read_params(tensors, SHAPES, source), params)


@pytest.mark.parametrize('stored', [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize('wanted', [np.float32, ml_dtypes.bfloat16])
def test_parameters_have_the_dtype_asked_for(stored, wanted):
    tensors = {k: v.astype(stored) for k, v in write_tensors(random_params(), source).items()}
    params = read_params(tensors, SHAPES, source, dtype=wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(wanted)}
    np.testing.assert_array_equal(
        params['norm']['bias'], tensors['then.0.bias'].astype(np.float64).astype(wanted)
    )


@pytest.mark.parametrize('stored', [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('wanted', [np.float16, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf, 6e4])
def test_parameters_that_are_not_finite_are_refused_by_name(stored, wanted, value):
    array = np.ones((3, 4), stored)
    array[1, 2] = value
    arrays = [('a/kernel', np.ones(2, np.float32)), ('b/kernel', array)]
    if np.isfinite(value):
        found = torch_weights.put_params(arrays, dtype=wanted)['b']['kernel']
        assert float(found[1, 2]) == pytest.approx(value, rel=0.01)
        return
    with pytest.raises(ValueError, match="parameter 'b/kernel' has values that are not finite"):
        torch_weights.put_params(arrays, dtype=wanted)


def test_parameters_keep_no_hold_on_the_tensors():
    tensors = write_tensors(random_params(), source)
    for leaf in jax.tree.leaves(read_params(tensors, SHAPES, source)):
        assert not any(np.shares_memory(leaf, tensor) for tensor in tensors.values())


class Lazy(Mapping):
    """Tensors that exist while somebody holds them; shapes are known without them."""

    def __init__(self, shapes):
        self.shapes = shapes
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return np.zeros(self.shapes[name], np.float32)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def shape_of(self, name):
        return self.shapes[name]


def test_tensors_are_read_and_placed_a_few_at_a_time():
    size = 500
    shapes = {
        f'layer_{i}': {'kernel': jax.ShapeDtypeStruct((size, size), jnp.float32)} for i in range(20)
    }
    tensors = Lazy({f'layer_{i}.weight': (size, size) for i in range(20)})
    placed = []

    def put(path, array):
        placed.append((path, array.shape, array.flags.c_contiguous))
        return path

    tracemalloc.start()
    params = read_params(
        tensors, shapes, lambda path: Source(path.replace('/kernel', '.weight')), put=put
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert params['layer_7']['kernel'] == 'layer_7/kernel'
    assert sorted(placed) == sorted((f'layer_{i}/kernel', (size, size), True) for i in range(20))
    assert len(tensors.asked) == 20
    # Four tensors and their conversions, and the two that were handed over last; not twenty: 1 MB
    # each.
    assert peak < 10.5 * 4 * size**2


@pytest.mark.parametrize(
    'change, text',
    [
        (lambda t: t.pop('first.bias'), r"1 tensors missing, e.g. 'first.bias'\."),
        (
            lambda t: t.update({'firsst.bias': t.pop('first.bias')}),
            r"1 tensors missing, e.g. 'first.bias' \(nearest: 'firsst.bias'\)",
        ),
        (
            lambda t: t.update({'then.2.weight': 0}),
            r"1 tensors unused, e.g. 'then.2.weight' \(nearest: 'then.1.weight'\): another network",
        ),
        (
            lambda t: t.update({'fused.weight': t['fused.weight'][:7]}),
            r"'fused.weight' has shape \(7, 6\), expected \(8, 6\)",
        ),
        (
            lambda t: t.update({'fused.weight': np.zeros((8, 6, 3, 3))}),
            r"'fused.weight' has shape \(8, 6, 3, 3\), expected \(8, 6\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, text):
    tensors = write_tensors(random_params(), source)
    change(tensors)
    with pytest.raises(ValueError, match=text):
        read_params(tensors, SHAPES, source)


def test_errors_name_a_tensor_as_the_file_does():
    tensors = write_tensors(random_params(), source)
    tensors = {f'model.{name}': tensor for name, tensor in tensors.items()} | {'other': 0}
    names = without_prefix(tensors, 'model.')
    tensors['model.first.bias'] = np.zeros(5)
    with pytest.raises(ValueError, match="'model.first.bias' has shape"):
        read_params(tensors, SHAPES, source, names=names)


def test_a_misshapen_tensor_is_found_before_any_is_converted():
    lazy = Lazy(expected_tensors(SHAPES, source) | {'temperature': (2,)})
    with pytest.raises(ValueError, match=r"'temperature' has shape \(2,\), expected \(\)"):
        read_params(lazy, SHAPES, source)
    assert lazy.asked == []


def test_a_path_in_no_row_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match='norm/scale is in no row'):
        rename('norm/scale', TABLE[:1])


def test_a_part_that_nobody_takes_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match=r'fused\.\w+: parameters take parts \[0\]'):
        expected_tensors({'a': SHAPES['a']}, source)


def settings(config):
    return read_settings(
        config,
        class_name='Net',
        defaults={'width': 8, 'mult': (1, 2)},
        fixed={'act': ('silu', None), 'sizes': ([1, 2],)},
        without_effect=('dropout',),
    )


def test_settings_are_completed_by_the_defaults():
    config = {'width': 3, 'act': 'silu', 'dropout': 0.1, '_version': 2, 'sizes': [1, 2]}
    assert settings(config) == {'width': 3, 'mult': (1, 2)}


@pytest.mark.parametrize(
    'config, text',
    [
        ({'act': 'gelu'}, "act='gelu' of Net is not supported; expected 'silu' or None"),
        ({'sizes': [2]}, r'sizes=\[2\] of Net is not supported'),
        ({'depth': 3}, 'depth=3: not a setting of Net that is known here'),
        ({'_class_name': 'Other'}, "_class_name='Other': expected Net"),
    ],
)
def test_settings_without_a_counterpart_are_refused_by_name(config, text):
    with pytest.raises(ValueError, match=text):
        settings(config)


@pytest.mark.parametrize('value', ['c', ['a']])
def test_a_value_in_no_table_is_refused_by_name(value):
    assert choose('kind', {'a': 1}, 'a', class_name='Net') == 1
    with pytest.raises(ValueError, match='kind=.* of Net is not supported; expected'):
        choose('kind', {'a': 1}, value, class_name='Net')


def test_both_spellings_of_attention_are_known_by_the_one_of_today():
    old = ['mid.attentions.0.query.weight', 'mid.attentions.0.proj_attn.bias', 'query.weight']
    new = ['mid.attentions.0.to_q.weight', 'mid.attentions.0.to_out.0.bias', 'query.weight']
    assert without_old_attention(old) == dict(zip(new, old, strict=True))
    assert without_old_attention(new) == {name: name for name in new}


class Half:
    """Keeps the second half of the output channels of every kernel, and all else in whole."""

    def indices(self, path, shape):
        if not path.endswith('kernel'):
            return [(slice(None),) * len(shape)]
        # In two parts, as two devices of a process may have them.
        count = shape[-1]
        bounds = count // 2, 3 * count // 4, count
        rest = (slice(None),) * (len(shape) - 1)
        return [(*rest, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]

    def join(self, path, shape, parts):
        assert [part.shape for part in parts] == [
            np.broadcast_to(0, shape)[index].shape for index in self.indices(path, shape)
        ]
        return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]

    def __call__(self, path, array):
        raise AssertionError('was given a whole array')


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_no_more_of_a_parameter_is_copied_than_is_kept(monkeypatch, dtype):
    params = random_params()
    copied, copy = [], torch_weights._copy
    monkeypatch.setattr(
        torch_weights, '_copy', lambda part, dtype: copied.append(part.size) or copy(part, dtype)
    )
    kept = read_params(write_tensors(params, source), SHAPES, source, dtype=dtype, put=Half())
    flat, wanted = (traverse_util.flatten_dict(tree, sep='/') for tree in (kept, params))
    for path, array in wanted.items():
        half = array[..., array.shape[-1] // 2 :] if path.endswith('kernel') else array
        np.testing.assert_array_equal(flat[path], half.astype(dtype), err_msg=path)
    assert sum(copied) == sum(array.size for array in flat.values())
