import copy
import multiprocessing
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmwsl.engine import StopOnSignalHook, latest_checkpoint, runs
from mmwsl.engine.hooks import stop_on_signal_hook
from tests.tiny import digits_config, network

pytestmark = pytest.mark.usefixtures('plain_configs')
# mixup draws within an epoch, and gradients are pending at most steps
MIXING = network(2, train_cfg=dict(augments=dict(type='Mixup', alpha=1.0)))
HOOKS = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.StopOnSignalHook'), dict(type='mmwsl.ExactResumeHook')]


class Send(Hook):
    """Sends a signal to this process and its workers, as Slurm does, in a step or a validation."""

    priority = 'HIGHEST'

    def __init__(self, number, step=None, epoch=None):
        self.number, self.step, self.epoch = number, step, epoch

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.step:
            self.send()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.epoch:
            self.send()

    def send(self):
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            os.kill(process.pid, self.number)


@pytest.fixture(autouse=True)
def callers_generators_and_handlers():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def run(work_dir, *sent, resume=False, workers=0, **settings):
    cfg = digits_config(
        work_dir,
        MIXING,
        2,
        **copy.deepcopy(
            dict(  # epochs of 6 steps
                custom_hooks=HOOKS, optim_wrapper=dict(accumulative_counts=4), **settings
            )
        ),
    )
    cfg.train_dataloader.num_workers = workers
    cfg.merge_from_dict(
        dict(
            resume=resume,
            load_from=latest_checkpoint(work_dir) if resume else None,
            experiment_name=f'{work_dir}{resume}'.replace('/', '_'),
        )
    )
    runner = Runner.from_cfg(cfg)
    if sent:
        runner.register_hook(Send(*sent))
        with pytest.raises(SystemExit) as ended:
            runner.train()
        assert ended.value.code == 128 + sent[0]
    else:
        runner.train()
    return runner


def losses(work_dir):
    return {line['step']: line['loss'] for line in runs.scalars(work_dir) if 'loss' in line}


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('unbroken')
    return run(folder), losses(folder)


@pytest.mark.parametrize(
    'sent, saved, workers',
    [
        ((signal.SIGTERM, 7), (1, 8), 0),
        ((signal.SIGUSR1, 2), (0, 3), 1),
        ((signal.SIGTERM, 8), (1, 9), 1),
        ((signal.SIGTERM, 5), (1, 6), 0),
        ((signal.SIGTERM, None, 1), (1, 6), 0),
    ],
    ids=['in an epoch', 'requeue', 'with workers', 'at the end of an epoch', 'in a validation'],
)
def test_a_run_that_was_told_to_end_ends_with_the_very_weights(tmp_path, unbroken, sent, saved, workers):
    run(tmp_path, *sent, workers=workers)
    assert latest_checkpoint(tmp_path) == str(tmp_path / 'interrupted.pth')
    meta = torch.load(tmp_path / 'interrupted.pth', weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == saved
    resumed, (expected, logged) = run(tmp_path, resume=True, workers=workers), unbroken
    assert resumed.iter == expected.iter == 12
    torch.testing.assert_close(resumed.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optim_wrapper.state_dict(), expected.optim_wrapper.state_dict(), rtol=0, atol=0)
    assert losses(tmp_path) == logged and list(logged) == list(range(1, 13))
    text = max(tmp_path.glob('*/*.log')).read_text()
    assert 'very weights' not in text and ('continues after' in text) == (saved[1] % 6 > 0)


def test_another_batch_size_begins_the_epoch_again_and_says_so(tmp_path):
    run(tmp_path, signal.SIGTERM, 7)
    resumed = run(tmp_path, resume=True, train_dataloader=dict(batch_size=50))
    assert resumed.iter == 8 + 12
    text = max(tmp_path.glob('*/*.log')).read_text()
    assert 'epoch 2 begins again with weights from within it, or the batch size was another' in text


def test_a_process_that_is_stuck_in_a_step_is_ended(monkeypatch):
    alarms = []
    monkeypatch.setattr(signal, 'alarm', alarms.append)
    hook = StopOnSignalHook(grace=7)
    hook._receive(signal.SIGTERM, None)
    assert not alarms  # between two steps Python gets its turn
    hook.before_train_iter(None, 0)
    hook._receive(signal.SIGTERM, None)
    assert alarms == [7]


def test_workers_that_outlive_the_first_signal_do_not_outlive_the_program(tmp_path, monkeypatch):
    at_exit, pipe = [], multiprocessing.Pipe()
    monkeypatch.setattr('atexit.register', at_exit.append)
    run(tmp_path)

    def work():
        stop_on_signal_hook._outlive_first_signal(None, 0)
        pipe[1].send('ready')
        threading.Event().wait()

    worker = multiprocessing.get_context('fork').Process(target=work, daemon=True)
    worker.start()
    assert pipe[0].recv() == 'ready'
    for each in at_exit:
        each()
    worker.join(30)
    assert worker.exitcode == -signal.SIGKILL
