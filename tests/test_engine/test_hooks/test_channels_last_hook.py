from types import SimpleNamespace

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from torch import nn

from mmwsl.engine.hooks import ChannelsLastHook, channels_last_hook
from tests.tiny import batch, build, network, run_digits

WIDE = 16  # channels; fewer are left as they are


def formats(model):
    """Whether each convolution computes in channels_last; a kernel of one pixel or one channel fits both."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
    return {
        weight.is_contiguous(memory_format=torch.channels_last)
        for weight in weights
        if weight.shape[1] > 1 and weight.shape[2] > 1
    }


@pytest.mark.parametrize('device_type, expected', [('cpu', True), (None, True), ('cuda', False)])
def test_weights_change_on_the_device_asked_for(device_type, expected):
    model = build(network(WIDE))
    ChannelsLastHook(device_type).before_train(SimpleNamespace(model=model))
    assert formats(model) == {expected}
    (features,) = model.backbone(torch.randn(2, 1, 8, 8))
    assert features.is_contiguous(memory_format=torch.channels_last) is expected


def test_mathematics_is_the_same():
    model = build(network(WIDE)).double()
    data = batch(20)
    data = dict(inputs=data['inputs'].double(), data_samples=data['data_samples'])
    gradients = []
    assert formats(model) == {False}
    for change in (lambda: None, lambda: ChannelsLastHook().before_train(SimpleNamespace(model=model))):
        change()
        (loss,) = model(**data, mode='loss').values()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert formats(model) == {True}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('channels, expected', [(WIDE, True), (WIDE - 1, False)])
def test_shortcut_whose_gradient_is_wrong_in_this_format_stays(monkeypatch, channels, expected):
    said = []
    monkeypatch.setattr(channels_last_hook, 'print_log', lambda message, *_, **__: said.append(message))
    model = build(network(channels))
    ChannelsLastHook().before_train(SimpleNamespace(model=model))
    assert formats(model) == {expected}
    assert [message.split()[7] for message in said] == ([] if expected else ['backbone.layer2.0.downsample.0'])


def test_frozen_shortcut_has_no_gradient():
    model = build(network(4)).requires_grad_(False)
    ChannelsLastHook().before_train(SimpleNamespace(model=model))
    assert formats(model) == {True}


def test_detector_with_a_to_of_its_own():
    """mmdet's KnowledgeDistillationSingleStageDetector takes a device alone."""

    class Moved(nn.Sequential):
        def to(self, device=None):
            return super().to(device=device)

    model = Moved(nn.Conv2d(16, 16, 3))
    ChannelsLastHook().before_train(SimpleNamespace(model=model))
    assert formats(model) == {True}


def test_run_with_one_setting(tmp_path):
    runner = run_digits(tmp_path, network(WIDE), **{'default_hooks.channels_last.type': 'mmwsl.ChannelsLastHook'})
    assert formats(runner.model) == {True}


def test_model_in_distributed_data_parallel_stays(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(build(network(WIDE)))
        ChannelsLastHook().before_train(SimpleNamespace(model=model))
        assert formats(model) == {False}
    finally:
        torch.distributed.destroy_process_group()


def test_initial_weights_are_those_without_it(tmp_path):
    def initial(device_type):
        hook = dict(type='mmwsl.ChannelsLastHook', device_type=device_type)
        runner = run_digits(
            tmp_path / device_type, network(WIDE), custom_hooks=[hook], optim_wrapper=dict(optimizer=dict(lr=0.0))
        )
        return dict(runner.model.named_parameters())

    torch.testing.assert_close(initial('cpu'), initial('cuda'), rtol=0, atol=0)
