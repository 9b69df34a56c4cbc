"""What the commands share: reading `--config`, checking `--workdir`, reporting mistakes.

A command is `run(schema, action, doc)`. The config file is loaded by `config_flags`, so that
`--config=FILE.py:ARGUMENT` and `--config.a.b=value` work; mistakes of the user end with one
message and exit status 2, errors of ours with a traceback.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from dmq_jax.config import from_config_dict

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'File of the run, and :ARGUMENT for its get_config.', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder that receives everything the run makes.')
_DEBUG = flags.DEFINE_bool('debug', False, 'Show the full traceback of every error.')

USER_ERRORS = (ValueError, KeyError, NotImplementedError, FloatingPointError, OSError)


def run(
    schema: type,
    action: Callable[[Any, Path | None], None],
    doc: str,
    *,
    needs_workdir: Callable[[], bool] = lambda: True,
) -> None:
    """Parses the command line, calls `action(config, workdir)`, and exits.

    Args:
      schema: the dataclass the config file describes.
      action: the command; its folder exists and is writable.
      doc: what --help says.
      needs_workdir: asked once the flags are parsed; if False, `action` gets None for a folder.
    """

    def act(arguments):
        if arguments[1:]:
            text = f'{arguments[1]!r} is not an option; options begin with --, see --help.'
            raise ValueError(text)
        # jax reports every back end it did not find; nobody asked.
        logging.set_verbosity(logging.WARNING)
        config = from_config_dict(_load_config(), schema)
        action(config, _writable_workdir() if needs_workdir() else None)

    # absl shows the text of the main module, and the flags registered under its name.
    sys.modules['__main__'].__doc__ = doc
    for holder in _CONFIG, _WORKDIR, _DEBUG:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    app.run(
        lambda arguments: exit_status(lambda: act(arguments), debug=_DEBUG.value),
        flags_parser=_parse_flags,
    )


def exit_status(act: Callable[[], None], *, debug: bool = False) -> int:
    """Calls `act`; a mistake of the user becomes one message and status 2.

    Args:
      act: a command.
      debug: lets every error through, with its traceback.
    """
    try:
        act()
    except USER_ERRORS as error:
        if debug or not _is_users(error):
            raise
        print(f'Error: {_text(error)}', file=sys.stderr)
        return 2
    return 0


def _load_config() -> Any:
    if _CONFIG.value is None:
        raise ValueError('--config is missing: name a file, e.g. --config=configs/FILE.py.')
    # config_flags postpones the failure to load a file until its first use.
    file = config_flags.get_config_filename(flags.FLAGS['config']).split(':')[0]
    if not Path(file).is_file():
        raise FileNotFoundError(f'--config={file}: no such file; expected a Python config file.')
    return _CONFIG.value


def _writable_workdir() -> Path:
    if not _WORKDIR.value:
        raise ValueError('--workdir is missing: name a folder for the results.')
    workdir = Path(_WORKDIR.value)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ValueError(
            f'--workdir={workdir}: cannot write there ({error.strerror}); name another folder.'
        ) from error
    return workdir


def _is_users(error: Exception) -> bool:
    """Whether the text of `error` was written for users: a check of ours, or a missing file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    package = Path(__file__).resolve().parent
    folders = package, package.parent / 'kernels', package.parent / 'configs'
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(origin.is_relative_to(folder) for folder in folders)


def _text(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str(KeyError) is a repr, quotes and all
    return str(error)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """`app.run`'s parser, except that mistakes end in one message and exit status 2."""
    try:
        return flags.FLAGS(argv)
    except (flags.Error, *USER_ERRORS, AttributeError, TypeError) as error:
        if '--debug' in argv:
            raise
        text = _text(error)
        if isinstance(error, KeyError | AttributeError):
            name = ' '.join(text.split())
            text = f'The config has no option {name}; dmq_jax/config/ lists them all.'
        elif 'Traceback' in text:
            # config_flags puts the whole traceback of a config file into its message.
            first, *_, last = text.strip().splitlines()
            text = f'{first}\n  {last}'
        print(f'Error: {text}', file=sys.stderr)
        sys.exit(2)
