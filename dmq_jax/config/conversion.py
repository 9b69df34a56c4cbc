"""ConfigDicts and nested dicts to the dataclasses, with every mistake named, and back."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from dmq_jax.config.checks import check, check_choice, field_types, nearest
from dmq_jax.config.run import Config

T = TypeVar('T')


def from_config_dict(mapping: Any, schema: type[T] = Config) -> T:
    """The dataclass tree of a ConfigDict or a nested dict; missing fields take their defaults.

    Args:
      mapping: an `ml_collections.ConfigDict`, or nested dicts such as those of `to_dict`. Values
        that already are dataclasses of the right type are taken as they are.
      schema: the dataclass to build.

    Raises:
      ValueError: an unknown name (with the nearest known one), a wrong type, a value out of its
        range; the text says where.
    """
    return convert(mapping, schema, 'config')


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts and tuples of plain values; `from_config_dict` of it, or of its JSON, is equal.

    Args:
      config: a dataclass of this package.
    """
    return dataclasses.asdict(config)


def describe(config: Any) -> str:
    """The resolved `config` as indented JSON, for people and for config.json."""
    return json.dumps(to_dict(config), indent=2)


def to_config_dict(config: Any):
    """A dataclass as a ConfigDict whose None fields know their type."""
    import ml_collections
    from ml_collections import config_dict

    result = ml_collections.ConfigDict()
    for name, hint in field_types(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif isinstance(value, dict):
            entries = {key: to_config_dict(entry) for key, entry in value.items()}
            value = ml_collections.ConfigDict(entries)
        elif types.NoneType in typing.get_args(hint):
            (kind,) = set(typing.get_args(hint)) - {types.NoneType}
            value = config_dict.FieldReference(value, field_type=kind)
        result[name] = value
    return result


def _fail(path: str, value: Any, expected: str) -> typing.NoReturn:
    raise ValueError(
        f'{path}={value!r}: expected {expected}, got {type(value).__name__}; '
        f'correct it in the config file or with --{path}=... on the command line.'
    )


def to_entries(value: Any, path: str, expected: str) -> dict[str, Any]:
    """The entries of a dict or a ConfigDict, with placeholders resolved."""
    if hasattr(value, 'to_dict'):
        value = value.to_dict()
    if not isinstance(value, Mapping):
        _fail(path, value, expected)
    return dict(value)


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, or a ValueError that names `path`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _build(value, hint, path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, arguments, path)
    if origin is dict:
        entries = to_entries(value, path, 'a dict')
        return {name: convert(v, arguments[1], f'{path}.{name}') for name, v in entries.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            _fail(path, value, 'a list or a tuple')
        return tuple(convert(v, arguments[0], f'{path}[{i}]') for i, v in enumerate(value))
    if origin is Literal:
        value = convert(value, type(arguments[0]), path)
        check_choice(path, value, hint)
        return value
    # bool is a subclass of int; as a number it is nearly always a slip.
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        _fail(path, value, hint.__name__)
    return value


def _convert_union(value: Any, options: Sequence[Any], path: str) -> Any:
    """An optional value, or the dataclass among `options` whose default `name` is value.name."""
    if types.NoneType in options:
        (hint,) = (option for option in options if option is not types.NoneType)
        return None if value is None else convert(value, hint, path)
    if isinstance(value, tuple(options)):
        return value
    schemas = {option.__dataclass_fields__['name'].default: option for option in options}
    name = to_entries(value, path, 'a dict').get('name')
    if name not in schemas:
        near = nearest(name, list(schemas)) if isinstance(name, str) else ''
        raise ValueError(f'{path}.name={name!r}: expected one of {", ".join(schemas)}{near or "."}')
    return _build(value, schemas[name], path)


def _build(value: Any, schema: type, path: str) -> Any:
    hints = field_types(schema)
    entries = to_entries(value, path, f'the options of {schema.__name__}')
    for name in entries:
        if name not in hints:
            near = nearest(name, list(hints)) or f'; it has {", ".join(hints)}.'
            raise ValueError(f'{schema.__name__} has no field {name!r}{near} (at {path})')
    missing = [
        field.name
        for field in dataclasses.fields(schema)
        if field.name not in entries
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    check(not missing, f'{path} lacks {", ".join(missing)}: {schema.__name__} has no default.')
    fields = {name: convert(v, hints[name], f'{path}.{name}') for name, v in entries.items()}
    try:
        return schema(**fields)
    except ValueError as error:
        raise ValueError(f'{path}.{error}') from None
