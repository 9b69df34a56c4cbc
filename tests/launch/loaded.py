"""What reading a teacher whose weights are spread costs a process, for `test_local.py`.

MODULE=tests.launch.loaded bash launch/local.sh N --out=FILE --path=TEACHER
"""

import json
from pathlib import Path

import jax

from dmq_jax.runtime import mesh
from dmq_jax.runtime.memory import peak_rss_mb
from dmq_jax.teachers import load_teacher
from tests.launch.joining import parse_and_join


def main():
    """Writes FILE.0.json, FILE.1.json, ... one of each process."""
    given = parse_and_join('--out', '--path')
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
