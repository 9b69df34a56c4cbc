"""Command line of a run.

  python -m dmq_jax.main --config=configs/FILE.py[:ARGUMENT] --workdir=FOLDER

reads the config file, applies `--config.a.b=value`, and runs the stages, leaving out what the
folder already holds. `--dry-run` prints the resolved options and what would be quantized.
"""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dmq_jax import command_line
from dmq_jax.config import Config, describe

_STAGES = flags.DEFINE_list(
    'stages', None, 'Stages to run, comma-separated; all if not given. teacher: describe it.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, in a run of several; auto: jax asks the machine.'
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
_DRY_RUN = flags.DEFINE_bool('dry-run', False, 'Print options and plan, then stop.')


def run(config: Config, workdir: Path | None) -> None:
    """Hands the run to the pipeline.

    Args:
      config: the run.
      workdir: its folder; None if nothing but a dry run is asked for.

    Raises:
      ValueError: for the name of a stage that does not exist.
    """
    # Imported late: it takes seconds, and --help and the checks before do not need it.
    from dmq_jax import pipeline
    from dmq_jax.runtime import hosts

    # Before anything that touches a device.
    hosts.join(
        hosts.find_cluster(
            os.environ, coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value,
            process_id=_PROCESS_ID.value,
        )
    )  # fmt: skip
    stages = pipeline.STAGES if _STAGES.value is None else tuple(_STAGES.value)
    check_stages(stages, (*pipeline.STAGES, 'teacher'))
    with hosts.ending_together():
        if workdir is None:
            print(describe(config))
            pipeline.dry_run(config)
        else:
            pipeline.run(config, workdir, stages)


def check_stages(stages: Sequence[str], known: Sequence[str]) -> None:
    """Refuses stages that are not `known`.

    Raises:
      ValueError: with the nearest known name.
    """
    for stage in stages:
        if stage not in known:
            near = difflib.get_close_matches(stage, known, n=1)
            hint = f'; did you mean {near[0]!r}?' if near else '.'
            raise ValueError(f'--stages has no {stage!r}: expected {", ".join(known)}{hint}')
    if not stages:
        raise ValueError(f'--stages is empty: expected some of {", ".join(known)}.')


def main() -> None:
    """Entry point of `python -m dmq_jax.main`."""
    command_line.run(Config, run, __doc__, needs_workdir=lambda: not _DRY_RUN.value)


if __name__ == '__main__':
    main()
