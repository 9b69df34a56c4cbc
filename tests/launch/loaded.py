"""What reading a teacher whose weights are spread costs a process, for `test_local.py`.

MODULE=tests.launch.loaded bash launch/local.sh N --out=FILE --path=TEACHER
"""

import argparse
import json
import os
from pathlib import Path

import jax

from dmq_jax.network_bench import peak_rss_mb
from dmq_jax.runtime import hosts, mesh
from dmq_jax.teachers import load_teacher


def main():
    """Writes FILE.0.json, FILE.1.json, ... one of each process."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--out', required=True)
    parser.add_argument('--path', required=True)
    parser.add_argument('--coordinator')
    parser.add_argument('--num_processes', type=int)
    parser.add_argument('--process_id', type=int)
    given = parser.parse_args()
    hosts.join(hosts.find_cluster(
        os.environ, coordinator=given.coordinator, num_processes=given.num_processes,
        process_id=given.process_id,
    ))  # fmt: skip
    spread = mesh.make_mesh(1, 1, -1)
    jax.block_until_ready(jax.numpy.zeros(1))
    before = peak_rss_mb()
    teacher = load_teacher(given.path, put=mesh.weight_placer(spread))
    jax.block_until_ready(teacher.params)
    grown_mb = peak_rss_mb() - before
    leaves = jax.tree.leaves(teacher.params)
    found = {'grown_mb': grown_mb, 'size_mb': sum(leaf.nbytes for leaf in leaves) / 1e6}
    Path(f'{given.out}.{jax.process_index()}.json').write_text(json.dumps(found))


if __name__ == '__main__':
    main()
