"""How the programs that `test_local.py` starts become processes of one run."""

import argparse
import os

from dmq_jax.runtime import hosts


def parse_and_join(*options):
    """The values of these options, after joining the run that launch/local.sh tells of."""
    parser = argparse.ArgumentParser()
    for option in options:
        parser.add_argument(option, required=True)
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes', type=int)
    parser.add_argument('--process_id', type=int)
    given = parser.parse_args()
    hosts.join(hosts.find_cluster(
        os.environ, coordinator=given.coordinator, num_processes=given.num_processes,
        process_id=given.process_id,
    ))  # fmt: skip
    return given
