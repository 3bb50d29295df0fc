import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from tests.published import NETWORKS, Weights
from tests.tiny import ROOT, build, distillation, load_tool, network, tool

import_teacher = load_tool('model_converters/import_teacher')


def published(weights):
    """Our keys as RepDistiller, mdistiller and chenyaofo write them."""
    return {key.replace('backbone.', '').replace('head.fc.', 'fc.'): value for key, value in weights.items()}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_resnet_is_renamed_to_our_keys(prefix):
    ours = dict(build(network(4)).state_dict())
    theirs = {prefix + key: value for key, value in published(ours).items()}
    converted, layout = import_teacher.convert(theirs)
    assert layout.startswith('ResNet (RepDistiller')
    torch.testing.assert_close(converted, ours, rtol=0, atol=0)


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_published_network_predicts_the_same_as_ours(name):
    expected_layout, published_network = NETWORKS[name]
    weights, images = Weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = published_network(weights, images)
    converted, layout = import_teacher.convert(dict(weights))
    assert layout.startswith(expected_layout)
    model = import_teacher.network_of(str(ROOT / f'configs/vanilla/{name}_cifar100.py'))
    import_teacher.load_weights(model, converted, name)
    model.eval()
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)


def test_unknown_layout_is_named():
    weights = {**published(build(network(4)).state_dict()), 'blocks.0.weight': torch.zeros(1)}
    with pytest.raises(ValueError, match=r'unknown layout.*depth 8.*Known: ResNet.*it has no blocks\.0\.weight'):
        import_teacher.convert(weights)


def test_what_is_converted_is_not_converted_again():
    with pytest.raises(ValueError, match="are mmpretrain's already, of a CIFAR ResNet of depth 8 with 10 classes"):
        import_teacher.convert(build(network(4)).state_dict())


@pytest.mark.parametrize('content', [None, {}, {'odd': torch.zeros(1)}], ids=['no file', 'nothing in it', 'unknown'])
def test_the_tool_does_not_send_to_itself(tmp_path, monkeypatch, content):
    if content is not None:
        torch.save(content, tmp_path / 'theirs.pth')
    monkeypatch.setattr(sys, 'argv', ['import_teacher.py', str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth')])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        import_teacher.main()
    assert 'import_teacher' not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize('wrap', [lambda w: w, lambda w: dict(model=w, epoch=240), lambda w: dict(state_dict=w),
                                  lambda w: dict(net=w)], ids=['plain', 'model', 'state_dict', 'net'])
def test_command_writes_what_the_config_takes(tmp_path, wrap, monkeypatch, capsys):
    ours = dict(build(network(16, depth=14)).state_dict())
    torch.save(wrap(published(ours)), tmp_path / 'theirs.pth')
    monkeypatch.setattr(sys, 'argv', ['import_teacher.py', str(tmp_path / 'theirs.pth'), str(tmp_path / 'a/ours.pth'),
                                      '--config', str(ROOT / 'configs/wsl_digits.py')])
    import_teacher.main()
    torch.testing.assert_close(torch.load(tmp_path / 'a/ours.pth')['state_dict'], ours, rtol=0, atol=0)
    assert 'ResNet' in capsys.readouterr().out


def test_network_that_is_not_the_configs_is_not_written(tmp_path, monkeypatch):
    torch.save(published(build(network(4)).state_dict()), tmp_path / 'theirs.pth')
    monkeypatch.setattr(sys, 'argv', ['import_teacher.py', str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth'),
                                      '--config', str(ROOT / 'configs/wsl_digits.py')])
    with pytest.raises(ValueError, match=r'looks like a CIFAR ResNet of depth 8 with 10 classes, the config has a '
                       r'CIFAR ResNet of depth 14 .*this ImageClassifier\. missing: backbone.* more.*It is a ResNet'):
        import_teacher.main()
    assert not (tmp_path / 'ours.pth').exists()


# mmpretrain needs torchvision's operators to be imported beside a CPU build; elsewhere compat.py defines them
PLAIN_MMPRETRAIN = """
import sys
sys.modules['mmwsl'] = None  # as if it were not installed
import torch
library = torch.library.Library('torchvision', 'FRAGMENT')
try:
    import torchvision
except RuntimeError:
    for name in [name for name in sys.modules if name.startswith('torchvision')]:
        del sys.modules[name]
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
from mmpretrain import get_model
model = get_model('resnet18_8xb32_in1k')
weights = torch.load(sys.argv[1], weights_only=True)['state_dict']
model.load_state_dict(weights, strict=True)
print('loaded', len(weights))
"""


@pytest.mark.slow
def test_student_loads_into_plain_mmpretrain(tmp_path):
    student = Config.fromfile(ROOT / 'configs/wsl_r34_r18_in1k.py').model.architecture
    preprocessor = dict(type='mmpretrain.ClsDataPreprocessor', mean=[1.0] * 3, std=[1.0] * 3)
    teacher = {**network(2, classes=1000)}
    teacher['backbone']['in_channels'] = 3
    model = build(distillation(architecture=student, teacher=teacher, data_preprocessor=preprocessor))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'epoch_1.pth')
    done = tool('model_converters/convert_kd_ckpt_to_student.py', tmp_path / 'epoch_1.pth')
    exported = tmp_path / 'epoch_1_student.pth'
    assert str(exported) in done.stdout
    plain = subprocess.run([sys.executable, '-W', 'ignore', '-c', PLAIN_MMPRETRAIN, exported], stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT, text=True, check=False)
    assert f'loaded {len(model.student.state_dict())}' in plain.stdout, plain.stdout[-3000:]


def test_file_without_a_student_is_refused(tmp_path):
    torch.save(build(network(2)).state_dict(), tmp_path / 'plain.pth')
    done = tool('model_converters/convert_kd_ckpt_to_student.py', tmp_path / 'plain.pth', check=False)
    assert done.returncode != 0
    assert "none of its" in done.stdout and "begins with 'architecture.'" in done.stdout
