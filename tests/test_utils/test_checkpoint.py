import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmwsl.utils import load_network, load_weights, read_weights
from tests.tiny import build, network


def test_keys_of_a_wrapper_are_taken_without_it(tmp_path):
    theirs, ours = build(network(2)), build(network(2))
    torch.save({f'module.{key}': value for key, value in theirs.state_dict().items()}, tmp_path / 'a.pth')
    load_network(ours, str(tmp_path / 'a.pth'))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_layers_that_adapt_what_they_load_do_so():
    def vit(size):
        init_default_scope('mmpretrain')
        arch = dict(embed_dims=8, num_layers=1, num_heads=2, feedforward_channels=8)
        return MODELS.build(dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=size, patch_size=4))

    small, large = vit(8), vit(16)
    load_weights(large, small.state_dict(), 'small.pth')
    assert large.pos_embed.shape == (1, 17, 8)
    torch.testing.assert_close(large.pos_embed[:, 0], small.pos_embed[:, 0])


def test_message_names_a_few_keys_and_counts_the_others():
    with pytest.raises(ValueError, match='deep.pth') as error:
        load_weights(build(network(2, depth=8)), build(network(2, depth=20)).state_dict(), 'deep.pth')
    assert 'looks like a CIFAR ResNet of depth 20 with 10 classes, the config has a CIFAR ResNet of depth 8' in str(
        error.value
    )
    assert 'unexpected: backbone.layer1.1.bn1.bias, ' in str(error.value)
    assert ' more. If it comes from other code' in str(error.value) and len(str(error.value)) < 600


def test_a_download_that_fails_keeps_its_message(monkeypatch):
    def unreachable(*_, **__):
        raise OSError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', unreachable)
    with pytest.raises(FileNotFoundError, match='no route to host.*copy teacher.pth here as '):
        read_weights('https://example.org/a/teacher.pth')
