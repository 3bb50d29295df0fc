import pytest
import torch

from tests.tiny import network, run_digits

HOOK = [dict(type='mmwsl.FiniteLossHook')]


def test_run_that_has_diverged_stops_at_the_next_logged_step(tmp_path):
    with pytest.raises(
        RuntimeError,
        match=r'training has diverged: in step \d these are not finite: .*loss nan.*'
        r'the parameter backbone.*smaller learning rate',
    ):
        run_digits(
            tmp_path,
            network(2),
            custom_hooks=HOOK,
            optim_wrapper=dict(optimizer=dict(lr=1e38)),
            default_hooks=dict(logger=dict(interval=2)),
        )


def test_loss_that_overflows_once_is_said(tmp_path, monkeypatch):
    def step_without_an_update(self, data, optim_wrapper):
        return dict(loss=torch.tensor(float('inf')), accuracy=torch.tensor(1.0))

    monkeypatch.setattr('mmpretrain.models.ImageClassifier.train_step', step_without_an_update)
    assert run_digits(tmp_path, network(2), custom_hooks=HOOK).iter == 6
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Not finite in step 1: loss inf. The parameters are still finite.' in log
