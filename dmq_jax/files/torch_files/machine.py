"""A machine that interprets pickles, opcode by opcode, and calls nothing but the allow-list.

It builds numbers, text, plain containers and NumPy arrays; Python's own `pickle` never sees the
data.
"""

import mmap
import pickletools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dmq_jax.files.torch_files.objects import (
    GLOBALS,
    FileError,
    Function,
    Ignored,
    State,
    checked_keys,
    make_dictionary,
    with_state,
)

# Items that calls may copy, per byte of the file: what a file copies it also has to contain, but
# short texts and sizes may be shared.
_COPIES_PER_BYTE = 16
_MARK = object()
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)


class Machine:
    """Interprets one pickle; everything it refuses, it refuses before building it."""

    def __init__(self, resolve_storage: Callable[[Any], Any], ignore: Sequence[str]):
        self.resolve_storage = resolve_storage
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_copies_left = 0

    def run(self, data: mmap.mmap, start: int) -> tuple[Any, int]:
        """The object of the pickle at `start`, and where the pickle ends."""
        data.seek(start)
        self.num_copies_left = _COPIES_PER_BYTE * len(data)
        name = 'its first'
        try:
            for opcode, argument, _ in pickletools.genops(data):
                name = opcode.name
                if name == 'STOP':
                    result = self._pop()
                    if isinstance(result, State):
                        result = self._finished(result)
                    return result, data.tell()
                self._step(name, argument)
        except FileError:
            raise
        except (
            ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
            MemoryError, RecursionError, struct.error,
        ) as error:  # fmt: skip
            # The interpreter of a damaged pickle may meet any of these at any operation.
            raise FileError(
                f'the pickle in it is damaged or cut off (at operation {name}: {error}); copy '
                'the file again'
            ) from error
        raise FileError('the pickle in it is cut off; copy the file again')

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if (handler := _HANDLERS.get(name)) is not None:
            handler(self)
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _SINGLETONS:
            stack.append(_SINGLETONS[name])
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            self._remember(argument)
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name == 'GLOBAL':
            stack.append(self._find(*argument.split(' ', 1)))
        elif name == 'INST':
            arguments = self._pop_mark()
            stack.append(self._call(self._find(*argument.split(' ', 1)), arguments))
        elif name == 'PERSID':
            stack.append(self.resolve_storage(argument))
        elif name not in ('PROTO', 'FRAME'):
            raise FileError(f'the pickle in it uses the operation {name}, which torch.save never')

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise FileError('the pickle in it is damaged (nothing on its stack)')
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        items = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                return items[::-1]
            items.append(item)
        raise FileError('the pickle in it is damaged (no mark on its stack)')

    def _top(self, *kinds: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kinds):
            raise FileError('the pickle in it fills something that is no container')
        return self.stack[-1]

    def _remember(self, key: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise FileError('the pickle in it is damaged (nothing on its stack)')
        self.memo[key] = self.stack[-1]
        if isinstance(self.stack[-1], State):
            self.stack[-1].memo_keys.append(key)

    def _find(self, module: str, name: str) -> Any:
        full = f'{module}.{name}'
        if full in GLOBALS:
            return GLOBALS[full]
        if any(full == prefix or full.startswith(f'{prefix}.') for prefix in self.ignore):
            return Ignored(full)
        raise FileError(
            f'its pickle asks for {full!r}, which is not on the list of harmless names; nothing '
            'was run. If you trust the file and do not need that object, pass '
            f"ignore=('{module}',); otherwise save only the state_dict with torch and read that"
        )

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Ignored):
            return Ignored(function.name)
        if not isinstance(function, Function):
            raise FileError(f'its pickle calls {function!r:.100}, which is no function')
        self.num_copies_left -= sum(len(a) for a in arguments if isinstance(a, _SIZED))
        if self.num_copies_left < 0:
            raise FileError('its pickle makes more than the file holds')
        return function.call(*(self._finished(a) for a in arguments))

    def _finished(self, value: Any) -> Any:
        """An object whose state never came, as it is."""
        return value.value if isinstance(value, State) and value.kind == 'dtype' else value

    def _append(self) -> None:
        self._extend_with([self._pop()])

    def _appends(self) -> None:
        self._extend_with(self._pop_mark())

    def _extend_with(self, items: list[Any]) -> None:
        container = self._top(list, Ignored)
        if isinstance(container, list):
            container.extend(items)

    def _additems(self) -> None:
        items = self._pop_mark()
        container = self._top(set, Ignored)
        if isinstance(container, set):
            container.update(checked_keys(items))

    def _setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._update_with([key, value])

    def _setitems(self) -> None:
        self._update_with(self._pop_mark())

    def _update_with(self, items: list[Any]) -> None:
        container = self._top(dict, Ignored)
        if isinstance(container, dict):
            container.update(make_dictionary(items))

    def _build(self) -> None:
        state = self._pop()
        target = self._top(object)
        if isinstance(target, State):
            finished = with_state(target, state)
            self.stack[-1] = finished
            for key in target.memo_keys:
                self.memo[key] = finished
        # The state of an OrderedDict is what nn.Module keeps beside it: versions of modules.
        elif not isinstance(target, dict | Ignored | np.ndarray):
            raise FileError(f'its pickle sets the state of a {type(target).__name__}')

    def _tuple_of(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple):
            raise FileError('its pickle calls a function without a tuple of arguments')
        self.stack.append(self._call(function, arguments))

    def _newobj_ex(self) -> None:
        keywords = self._pop()
        if keywords != {} and not isinstance(self.stack[-2], Ignored):
            raise FileError('its pickle calls a function with keywords')
        self._reduce()

    def _obj(self) -> None:
        function, *arguments = self._pop_mark()
        self.stack.append(self._call(function, arguments))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise FileError('its pickle asks for a name that is no text')
        self.stack.append(self._find(module, name))


_HANDLERS: dict[str, Callable[[Machine], None]] = {
    'MARK': lambda m: m.stack.append(_MARK),
    'POP': lambda m: m.stack.pop(),
    'POP_MARK': lambda m: m._pop_mark(),
    'DUP': lambda m: m.stack.append(m.stack[-1]),
    'MEMOIZE': lambda m: m._remember(len(m.memo)),
    'EMPTY_LIST': lambda m: m.stack.append([]),
    'EMPTY_DICT': lambda m: m.stack.append({}),
    'EMPTY_SET': lambda m: m.stack.append(set()),
    'EMPTY_TUPLE': lambda m: m.stack.append(()),
    'LIST': lambda m: m.stack.append(m._pop_mark()),
    'TUPLE': lambda m: m.stack.append(tuple(m._pop_mark())),
    'DICT': lambda m: m.stack.append(make_dictionary(m._pop_mark())),
    'FROZENSET': lambda m: m.stack.append(frozenset(checked_keys(m._pop_mark()))),
    'TUPLE1': lambda m: m._tuple_of(1),
    'TUPLE2': lambda m: m._tuple_of(2),
    'TUPLE3': lambda m: m._tuple_of(3),
    'APPEND': Machine._append,
    'APPENDS': Machine._appends,
    'ADDITEMS': Machine._additems,
    'SETITEM': Machine._setitem,
    'SETITEMS': Machine._setitems,
    'BUILD': Machine._build,
    'REDUCE': Machine._reduce,
    'NEWOBJ': Machine._reduce,
    'NEWOBJ_EX': Machine._newobj_ex,
    'OBJ': Machine._obj,
    'STACK_GLOBAL': Machine._stack_global,
    'BINPERSID': lambda m: m.stack.append(m.resolve_storage(m._pop())),
}
_SINGLETONS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_LITERALS = set(
    'INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING '
    'SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE '
    'BINUNICODE BINUNICODE8'.split()
)
