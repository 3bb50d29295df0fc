import pytest
import torch
from torch import nn

from mmwsl.models.teachers.watch import Watch


def net():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Conv2d(2, 2, 1))).eval()


def drop_the_bias(network):
    network[0].bias = None


CHANGES = {
    'weight': lambda network: nn.init.zeros_(network[0].weight),
    'statistics': lambda network: network[1].running_var.add_(1),
    'counter': lambda network: network[1].num_batches_tracked.add_(1),
    'another tensor': lambda network: setattr(network[2][0].weight, 'data', network[2][0].weight.data.clone()),
    'another parameter': lambda network: setattr(network[2][0], 'weight', nn.Parameter(torch.ones(2, 2, 1, 1))),
    'another layer': lambda network: network.__setitem__(1, nn.BatchNorm2d(2).eval()),
    'another layer inside': lambda network: network[2].__setitem__(0, nn.Identity().eval()),
    'one more layer': lambda network: network.append(nn.Identity().eval()),
    'no bias': drop_the_bias,
    'mode': lambda network: network[1].train(),
    'hook': lambda network: network[2][0].register_forward_hook(lambda *_: None),
    'hook before': lambda network: network[2].register_forward_pre_hook(lambda *_: None),
    'another type': lambda network: network.double(),
}
WRITES = {
    'zero': lambda network: network[0].weight.data.zero_(),
    'sign': lambda network: network[0].weight.data.neg_(),
    'one number': lambda network: network[2][0].bias.data[0].add_(1e-4),
    'statistics': lambda network: network[1].running_mean.data.add_(1),
}


@pytest.mark.parametrize(
    'change, device',
    [
        (change, device)
        for change in CHANGES
        for device in ('cpu', 'meta')
        if (change, device) != ('another tensor', 'meta')
    ],
)  # all at address 0
def test_a_change_is_seen_once(change, device):
    """Tensors on 'meta' have no values, as if on a GPU: whatever reads one back fails."""
    network = net().to(device)
    watch = Watch(network)
    assert not watch.has_changed()
    with torch.no_grad():
        CHANGES[change](network)
    assert watch.has_changed()
    assert not watch.has_changed()


@pytest.mark.parametrize('write', WRITES)
def test_a_write_that_no_counter_counts_is_seen_on_a_cpu(write):
    network = net()
    watch = Watch(network)
    versions = [tensor._version for tensor in network.state_dict(keep_vars=True).values()]
    WRITES[write](network)
    assert versions == [tensor._version for tensor in network.state_dict(keep_vars=True).values()]
    assert watch.has_changed()
    assert not watch.has_changed()


def test_a_forward_pass_changes_nothing():
    network = net()
    watch = Watch(network)
    network(torch.randn(2, 1, 4, 4)).sum().backward()
    assert not watch.has_changed()


def test_weights_without_a_counter_can_be_watched():
    with torch.inference_mode():
        network = net()
    watch = Watch(network)
    assert not watch.has_changed()
    network[0].weight.data.zero_()
    assert watch.has_changed()
