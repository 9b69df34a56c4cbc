"""The loop of steps: what it logs and saves, how it goes on, how it stops."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from dmq_jax import descent
from dmq_jax.config import AdaptConfig, FinetuneConfig
from dmq_jax.runtime import hosts, log
from dmq_jax.runtime.checkpoint import Checkpoints

EVERY = {'num_iterations': 10, 'log_every': 4, 'checkpoint_every': 5}
OPTIONS = (FinetuneConfig(**EVERY), AdaptConfig(**EVERY))


class Train(NamedTuple):
    x: jnp.ndarray
    step: jnp.ndarray


START = Train(jnp.ones(()), jnp.zeros((), jnp.int32))


def halve(train):
    return Train(train.x / 2, train.step + 1), train.x


def descend(folder, step=halve, config=OPTIONS[0]):
    with Checkpoints(folder / 'checkpoints') as checkpoints, log.make_writer(folder) as writer:
        restored = checkpoints.restore_latest(like=(START, np.zeros((), np.float32)))
        train, spent_s = (START, 0.0) if restored is None else restored
        return descent.descend(
            step, train, float(spent_s), config, checkpoints=checkpoints, writer=writer,
            description='test',
        )  # fmt: skip


def logged(folder):
    return {line['step']: line['loss'] for line in log.read_metrics(folder)}


@pytest.mark.parametrize('config', OPTIONS, ids=['finetune', 'adapt'])
def test_the_mean_loss_since_the_last_line_is_logged_and_before_every_checkpoint(tmp_path, config):
    train, duration_s = descend(tmp_path, config=config)
    assert int(train.step) == 10 and float(train.x) == 2.0**-10 and duration_s > 0
    losses = 0.5 ** np.arange(10)
    spans = {4: (0, 4), 5: (4, 5), 8: (5, 8), 10: (8, 10)}
    wanted = {step: pytest.approx(losses[a:b].mean()) for step, (a, b) in spans.items()}
    assert logged(tmp_path) == wanted


def test_it_goes_on_after_the_last_checkpoint_with_the_time_spent(tmp_path):
    def stops(train):
        if int(train.step) == 7:
            raise KeyboardInterrupt
        return halve(train)

    with pytest.raises(KeyboardInterrupt):
        descend(tmp_path, stops)
    steps = []
    train, _ = descend(tmp_path, lambda train: steps.append(int(train.step)) or halve(train))
    assert steps == [5, 6, 7, 8, 9]
    assert float(train.x) == 2.0**-10


def test_a_request_to_stop_saves_first(tmp_path, monkeypatch):
    asked = iter([False, False, True])
    monkeypatch.setattr(hosts, 'stop_requested', lambda: next(asked))
    with pytest.raises(hosts.Interrupted):
        descend(tmp_path)
    monkeypatch.undo()
    steps = []
    descend(tmp_path, lambda train: steps.append(int(train.step)) or halve(train))
    assert steps == list(range(3, 10))
    assert 3 in logged(tmp_path)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    def breaks(train):
        train, value = halve(train)
        return train, jnp.where(train.step > 6, jnp.nan, value)

    with pytest.raises(FloatingPointError, match='test: loss is nan at step 8.* up to 5 are kept'):
        descend(tmp_path, breaks)
    with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
        assert checkpoints.latest() == 5
