"""Commands in a process of their own: their flags are global to a process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

CONFIG_FILE = """
from dmq_jax.config import base, student


def get_config(arg=None):
    config = base()
    config.students.w4 = student('efficientdm')
    config.seed = int(arg or 0)
    return config
"""


def call(script, folder, *arguments):
    """What became of `python -c script arguments` in `folder`."""
    return subprocess.run(
        [sys.executable, '-c', script, *arguments],
        cwd=folder,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
