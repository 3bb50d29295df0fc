"""tools/test.py, in this process, on small networks and the digits."""

import json
import sys

import pytest
import torch
from mmengine import load
from mmengine.config import Config
from mmengine.hub import get_model
from mmengine.registry import DATASETS, init_default_scope

from mmwsl.datasets import Digits
from tests.tiny import PREPROCESSOR, ROOT, build, distillation, load_tool, network, on_device, save_teacher


@DATASETS.register_module()
class NegativeDigits(Digits):
    def load_data_list(self):
        return [{**item, 'gt_label': -1 - item['gt_label']} for item in super().load_data_list()]


LENET = 'mmpretrain::lenet/lenet5_mnist.py'
TTA = dict(type='AverageClsScoreTTA')


@pytest.fixture
def tested(tmp_path, monkeypatch):
    """Run tools/test.py on the digits, with a model and other settings."""

    def run(model, *arguments, **settings):
        cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
        name = f'{tmp_path.name}_{len(settings)}'
        cfg.merge_from_dict(dict(work_dir=str(tmp_path), experiment_name=name, **settings))
        cfg.model = model
        cfg.dump(tmp_path / 'config.py')
        monkeypatch.setattr(sys, 'argv', ['test.py', str(tmp_path / 'config.py'), *map(str, arguments)])
        load_tool('test').main()

    return run


@pytest.fixture
def accuracy(tested, tmp_path):
    """Top-1 that tools/test.py finds, in per cent."""

    def run(model, *arguments, **settings):
        tested(model, *arguments, '--out-item', 'metrics', '--out', tmp_path / 'out.json', **settings)
        return json.loads((tmp_path / 'out.json').read_text())['accuracy/top1']

    return run


@pytest.fixture
def scores(tested, tmp_path):
    """Class scores that tools/test.py finds, of each test image. Shape: (1197, 10)."""

    def run(model, *arguments, **settings):
        tested(model, *arguments, '--out', tmp_path / 'out.pkl', **settings)
        return torch.stack([sample['pred_score'] for sample in load(tmp_path / 'out.pkl')])

    return run


@pytest.fixture
def biased(tmp_path):
    """A student's file, which answers with one class, and the share of the test images that are of it."""
    student = build(network(2, data_preprocessor=PREPROCESSOR))
    with torch.no_grad():
        student.head.fc.weight.zero_()
        student.head.fc.bias.zero_()[3] = 1
    torch.save(student.state_dict(), tmp_path / 'student.pth')
    return tmp_path / 'student.pth', 10.1922  # 122 of 1,197


def test_what_training_began_with_is_not_tested(accuracy, biased, tmp_path):
    student, share = biased
    other = save_teacher(tmp_path / 'other.pth', network(2))
    assert accuracy(distillation(), student) == pytest.approx(share, abs=1e-3)
    assert accuracy(distillation(), student, load_from=other) == pytest.approx(share, abs=1e-3)


def test_an_option_that_nothing_reads_is_refused(tested, biased):
    with pytest.raises(ValueError, match="nothing reads 'test_dataloder'. Did you mean 'test_dataloader'"):
        tested(distillation(), biased[0], '--cfg-options', 'test_dataloder.batch_size=2')


# ---- other kinds of config


def images(size=8):
    """The test images, as they are. Shape: (1197, 1, size, size)."""
    init_default_scope('mmpretrain')
    digits = DATASETS.build(dict(type='mmwsl.Digits', split='test', pipeline=[dict(type='PackInputs')]))
    stacked = torch.stack([item['inputs'] for item in digits]).float()
    return stacked.repeat_interleave(size // 8, 2).repeat_interleave(size // 8, 3)


def alone(net, inputs):
    net.eval()
    with torch.no_grad():
        return net(inputs, mode='tensor').softmax(1)


@pytest.mark.parametrize('shared, mean, std', [(None, 33.46, 78.87), (PREPROCESSOR, 4.9, 6.0)])
def test_student_of_another_package(scores, tmp_path, shared, mean, std):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    net = get_model(LENET)
    torch.save({f'architecture.{key}': value for key, value in net.state_dict().items()}, tmp_path / 'run.pth')
    larger = [dict(type='Resize', scale=32, interpolation='nearest'), dict(type='PackInputs')]
    model = distillation(architecture=dict(cfg_path=LENET), teacher=dict(cfg_path=LENET), data_preprocessor=shared)
    found = scores(
        model, tmp_path / 'run.pth', data_preprocessor=None, test_dataloader=dict(dataset=dict(pipeline=larger))
    )
    torch.testing.assert_close(found, alone(net, (images(32) - mean) / std), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('part', ['student', 'teacher', 'network alone'])
def test_image_and_mirror_image_are_averaged(scores, tmp_path, part):
    net = build(network(2, data_preprocessor=PREPROCESSOR))
    net.head.fc.weight.data.mul_(100)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    model = {'student': distillation(), 'teacher': distillation(teacher=network(2)), 'network alone': network(2)}[part]
    found = scores(model, tmp_path / 'net.pth', '--tta', *(['--teacher'] if part == 'teacher' else []))
    inputs = (images() - 4.9) / 6
    expected = (alone(net, inputs) + alone(net, inputs.flip(3))) / 2
    assert (expected - alone(net, inputs)).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('way', ['tta_pipeline', 'model'])
def test_a_configs_own_augmentation_is_used(scores, tmp_path, way):
    net = build(network(2, data_preprocessor=PREPROCESSOR))
    net.head.fc.weight.data.mul_(100)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    up_and_down = [dict(type='RandomFlip', prob=prob, direction='vertical') for prob in (1.0, 0.0)]
    pipeline = [dict(type='TestTimeAug', transforms=[up_and_down, [dict(type='PackInputs')]])]
    if way == 'model':
        found = scores(
            {**TTA, 'module': distillation()},
            tmp_path / 'net.pth',
            test_dataloader=dict(dataset=dict(pipeline=pipeline)),
        )
    else:
        found = scores(distillation(), tmp_path / 'net.pth', '--tta', tta_model=TTA, tta_pipeline=pipeline)
    inputs = (images() - 4.9) / 6
    expected = (alone(net, inputs) + alone(net, inputs.flip(2))) / 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_images_on_the_device_are_not_augmented(tested, biased):
    loader = on_device()['val_dataloader']
    with pytest.raises(ValueError, match='--tta transforms each image when it is read, but the images of a mmwsl.Devi'):
        tested(distillation(), biased[0], '--tta', test_dataloader=loader)


def test_labels_are_compared_with_the_classes(tested, biased):
    with pytest.raises(ValueError, match=r'test_dataloader: image 0 has the label -\d+, which is none of 10'):
        tested(distillation(), biased[0], test_dataloader=dict(dataset=dict(type='NegativeDigits')))


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'model.backbone.type': 'mmwsl.CIFARResnet'}, "there is no model '.*'. Did you mean 'mmwsl.CIFARResNet'"),
        ({'test_dataloader.dataset.type': 'mmwsl.Digit'}, "there is no dataset '.*'. Did you mean 'mmwsl.Digits'"),
        ({'test_dataloader.dataset.splitt': 'a'}, "Digits has no argument 'splitt'. Did you mean 'split'"),
    ],
)
def test_a_slip_in_the_config_is_explained(tested, settings, message):
    options = [f'{key}={value}' for key, value in settings.items()]
    with pytest.raises(ValueError, match=message):
        tested(network(2, data_preprocessor=PREPROCESSOR), 'student.pth', '--cfg-options', *options)
