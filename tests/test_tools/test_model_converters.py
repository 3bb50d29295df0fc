import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

from mmwsl.utils import load_network
from tests.published import ELSEWHERE, NETWORKS, Weights, mobilenet_v2, repvgg, resnet
from tests.tiny import ROOT, build, distillation, load_tool, network, tool

import_teacher = load_tool('model_converters/import_teacher')
export = load_tool('model_converters/convert_kd_ckpt_to_student')


def published(weights):
    """Our keys as RepDistiller, mdistiller and chenyaofo write them."""
    return {key.replace('backbone.', '').replace('head.fc.', 'fc.'): value for key, value in weights.items()}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_resnet_is_renamed_to_our_keys(prefix):
    ours = dict(build(network(4)).state_dict())
    theirs = {prefix + key: value for key, value in published(ours).items()}
    converted, layout = import_teacher.convert(theirs)
    assert layout.name.startswith('ResNet (RepDistiller')
    torch.testing.assert_close(converted, ours, rtol=0, atol=0)


@pytest.mark.parametrize('name', NETWORKS)
@torch.no_grad()
def test_published_network_predicts_the_same_as_ours(name):
    expected_layout, published_network = NETWORKS[name]
    weights, images = Weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = published_network(weights, images)
    converted, layout = import_teacher.convert(dict(weights))
    assert layout.name.startswith(expected_layout)
    model = import_teacher.network_of(str(ROOT / f'configs/vanilla/{name}_cifar100.py'))
    import_teacher.load_weights(model, converted, name)
    model.eval()
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)


def as_torchvision_draws(model, seed=0):
    """Eval mode, with statistics of BatchNorm that are not those of a new network."""
    generator = torch.Generator().manual_seed(seed)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1, generator=generator)
        norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize('name', ELSEWHERE)
@torch.no_grad()
def test_network_is_built_from_the_shapes_of_a_published_one(name):
    expected_layout, kind, published_network = ELSEWHERE[name]
    weights, images = Weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = published_network(weights, images)
    converted, layout = import_teacher.convert({f'module.{key}': value for key, value in weights.items()})
    assert layout.name.startswith(expected_layout)
    config, model = import_teacher.published_network(converted, layout, None, name)
    assert config['backbone']['type'].removeprefix('mmwsl.') == kind
    torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    'name, kind',
    [
        ('resnet18', 'ResNet'),
        ('resnext50_32x4d', 'ResNeXt'),
        ('wide_resnet50_2', 'ResNet'),
        ('mobilenet_v2', 'MobileNetV2'),
        ('shufflenet_v2_x0_5', 'ShuffleNetV2'),
        ('shufflenet_v2_x2_0', 'ShuffleNetV2'),
    ],
)
@torch.no_grad()
def test_torchvisions_network_predicts_the_same(name, kind):
    theirs = as_torchvision_draws(torchvision.models.get_model(name, num_classes=7))
    converted, layout = import_teacher.convert(theirs.state_dict())
    config, model = import_teacher.published_network(converted, layout, 224, name)
    assert config['backbone']['type'] == kind and 'torchvision' in layout.name
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['vgg11', 'vgg16_bn'])
def test_torchvisions_vgg_fits(name):
    """In shapes alone: its classifier has a hundred million weights."""
    with torch.device('meta'):
        theirs = torchvision.models.get_model(name, num_classes=7)
        converted, layout = import_teacher.convert(theirs.state_dict())
        config = layout.network(converted, None)
        ours = build_alone(config)
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in converted.items()
    }
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.Linear)
    assert [type(module) for module in ours.modules() if isinstance(module, kinds)] == [
        type(module) for module in theirs.modules() if isinstance(module, kinds)
    ]


def build_alone(config):
    init_default_scope('mmpretrain')
    return MODELS.build(config)


@torch.no_grad()
def test_timms_network_is_taken_with_a_config_that_names_it(tmp_path, capsys):
    timm = pytest.importorskip('timm')
    theirs = as_torchvision_draws(timm.create_model('mobilenetv3_small_050', num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    network = "model = dict(type='TimmClassifier', model_name='mobilenetv3_small_050', num_classes={})\n"
    (tmp_path / 'seven.py').write_text(network.format(7))
    (tmp_path / 'eight.py').write_text(network.format(8))
    files = [str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth')]
    import_teacher.main([*files, '--config', str(tmp_path / 'seven.py')])
    assert "timm's own" in capsys.readouterr().out
    ours = import_teacher.network_of(str(tmp_path / 'seven.py'))
    load_network(ours, str(tmp_path / 'ours.pth'))
    ours.eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))
    with pytest.raises(ValueError, match='of another shape'):
        import_teacher.main([*files, '--config', str(tmp_path / 'eight.py')])


def test_the_printed_teacher_is_the_one_that_was_written(tmp_path, capsys):
    weights = Weights()
    ELSEWHERE['akamaster ResNet-20, option A'][2](weights, torch.zeros(1, 3, 8, 8))
    torch.save(
        {'state_dict': {f'module.{key}': value for key, value in weights.items()}, 'best_prec1': 91.7},
        tmp_path / 'resnet20.th',
    )
    import_teacher.main([str(tmp_path / 'resnet20.th'), str(tmp_path / 'ours.pth')])
    first, _, lines = capsys.readouterr().out.partition('\n')
    assert 'a CIFAR ResNet of depth 20 with 100 classes' in first
    (tmp_path / 'teacher.py').write_text(lines)
    cfg = Config.fromfile(tmp_path / 'teacher.py')
    assert cfg.teacher_ckpt == str(tmp_path / 'ours.pth') and cfg.teacher.backbone.shortcut == 'pad'
    load_network(build_alone(cfg.teacher), cfg.teacher_ckpt)


def preactivation(blocks):
    """kuangliu's PreActResNet: keys of a ResNet, but for the stem's norm, and norms of other widths."""
    weights = {'conv1.weight': torch.zeros(64, 3, 3, 3), 'linear.weight': torch.zeros(10, 512)}
    for stage, depth in enumerate(blocks, start=1):
        for index in range(depth):
            for layer in ('bn1', 'conv1', 'bn2', 'conv2'):
                weights[f'layer{stage}.{index}.{layer}.weight'] = torch.zeros(64, 64, 3, 3)
    return weights


def weights_of(forward, *args):
    forward(weights := Weights(), torch.zeros(1, 3, 8, 8), *args)
    return weights


@pytest.mark.parametrize(
    'weights, message',
    [
        (
            preactivation((2, 2, 2, 2)),
            r'depth 18 with 10 classes\. The nearest is ResNet \(kuangliu.*except for bn1\.weight',
        ),
        (
            weights_of(repvgg, (1, 1, 1, 1), (8, 8, 8, 8), 7),
            'a network with 7 classes do not tell whether.*give --image-size 32 or 224',
        ),
        (
            weights_of(resnet, (1, 2, 3), 16, (16, 32, 64)),
            'CIFAR ResNet of depth 14 with 100 classes, laid out as ResNet.*no network here.*--config',
        ),
        (
            {**weights_of(mobilenet_v2, 0.5), 'features.25.conv.2.weight': torch.zeros(8, 8, 1, 1)},
            'a network of 53 convolutions with 8 to 1280 channels, and 100 classes, laid out as MobileNetV2.*'
            'no network here',
        ),
    ],
    ids=['pre-activation', 'unknown strides', 'unknown blocks', 'unknown depth'],
)
def test_what_is_not_known_is_described_and_not_written(tmp_path, weights, message):
    torch.save(dict(weights), tmp_path / 'theirs.pth')
    with pytest.raises(ValueError, match=message) as error:
        import_teacher.main([str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth')])
    assert len(str(error.value)) < 600 and not (tmp_path / 'ours.pth').exists()


def test_unknown_layout_is_named():
    weights = {**published(build(network(4)).state_dict()), 'blocks.0.weight': torch.zeros(1)}
    with pytest.raises(
        ValueError,
        match=r'unknown layout.*depth 8.*nearest is ResNet \(RepDistiller.*except for '
        r'blocks\.0\.weight\. docs/teachers',
    ):
        import_teacher.convert(weights)


def test_what_is_converted_is_not_converted_again():
    with pytest.raises(
        ValueError,
        match="nothing to convert: the keys, of a CIFAR ResNet of depth 8 with 10 classes, are already mmpretrain's",
    ):
        import_teacher.convert(build(network(4)).state_dict())


@pytest.mark.parametrize('content', [None, {}, {'odd': torch.zeros(1)}], ids=['no file', 'nothing in it', 'unknown'])
def test_the_tool_does_not_send_to_itself(tmp_path, monkeypatch, content):
    if content is not None:
        torch.save(content, tmp_path / 'theirs.pth')
    monkeypatch.setattr(sys, 'argv', ['import_teacher.py', str(tmp_path / 'theirs.pth'), str(tmp_path / 'ours.pth')])
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        import_teacher.main()
    assert 'import_teacher' not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    'wrap',
    [lambda w: w, lambda w: dict(model=w, epoch=240), lambda w: dict(state_dict=w), lambda w: dict(net=w)],
    ids=['plain', 'model', 'state_dict', 'net'],
)
def test_command_writes_what_the_config_takes(tmp_path, wrap, monkeypatch, capsys):
    ours = dict(build(network(16, depth=14)).state_dict())
    torch.save(wrap(published(ours)), tmp_path / 'theirs.pth')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'import_teacher.py',
            str(tmp_path / 'theirs.pth'),
            str(tmp_path / 'a/ours.pth'),
            '--config',
            str(ROOT / 'configs/wsl_digits.py'),
        ],
    )
    import_teacher.main()
    torch.testing.assert_close(torch.load(tmp_path / 'a/ours.pth')['state_dict'], ours, rtol=0, atol=0)
    assert 'ResNet' in capsys.readouterr().out


def test_network_that_is_not_the_configs_is_not_written(tmp_path, monkeypatch):
    torch.save(published(build(network(4)).state_dict()), tmp_path / 'theirs.pth')
    monkeypatch.setattr(
        sys,
        'argv',
        [
            'import_teacher.py',
            str(tmp_path / 'theirs.pth'),
            str(tmp_path / 'ours.pth'),
            '--config',
            str(ROOT / 'configs/wsl_digits.py'),
        ],
    )
    with pytest.raises(
        ValueError,
        match=r'looks like a CIFAR ResNet of depth 8 with 10 classes, the config has a '
        r'CIFAR ResNet of depth 14 .*this ImageClassifier\. missing: backbone.* more.*layout is ResNet',
    ):
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
    plain = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PLAIN_MMPRETRAIN, exported],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert f'loaded {len(model.student.state_dict())}' in plain.stdout, plain.stdout[-3000:]


def test_file_without_a_student_is_refused(tmp_path):
    torch.save(build(network(2)).state_dict(), tmp_path / 'plain.pth')
    done = tool('model_converters/convert_kd_ckpt_to_student.py', tmp_path / 'plain.pth', check=False)
    assert done.returncode != 0
    assert 'none of its' in done.stdout and "begins with 'architecture.'" in done.stdout


# ---------------------------------------------------------------------------------------------- a student that predicts

NAMES = ('ant', 'bee', 'cat', 'dog', 'eel', 'fox')


@pytest.fixture(scope='module')
def students():
    """A six-class student for images of one and of three channels, with random statistics of BatchNorm."""
    torch.manual_seed(3)
    found = {channels: build(network(4, classes=6)) for channels in (1, 3)}
    found[3].backbone.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    for model in found.values():
        model.eval()
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.1, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
    return found


def save_run(folder, model, dataset, preprocessor, channels=3, names=NAMES, kind='ImageClassifier', **meta):
    """A distillation's checkpoint as mmengine writes it, of a config with these test images."""
    architecture = network(4, classes=6)
    architecture['backbone']['in_channels'] = channels
    architecture['type'] = kind
    cfg = Config(
        dict(
            model=dict(type='mmwsl.WSLDistill', architecture=architecture, teacher=network(2, classes=6)),
            data_preprocessor=dict(type='ClsDataPreprocessor', **preprocessor),
            test_dataloader=dict(dataset=dataset),
        )
    )
    weights = {f'architecture.{key}': value for key, value in model.state_dict().items()}
    torch.save(
        dict(state_dict=weights, meta={**dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=names)), **meta}),
        folder / 'epoch_1.pth',
    )
    return [str(folder / 'epoch_1.pth')]


CIFAR = dict(type='CIFAR100', split='test', pipeline=[dict(type='PackInputs')])
COLOURS = dict(mean=[129.0, 124.0, 112.0], std=[68.0, 65.0, 70.0], to_rgb=False)  # of RGB arrays
FOLDER = dict(type='CustomDataset', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')])


def picture(folder, *shape, brightest=255):
    """A picture of noise in a file, which keeps each pixel, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, brightest, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'picture.jpg', format='PNG')
    return torch.from_numpy(pixels).float()


def scores(model, images, preprocessor):
    """Of the network alone, on a batch of pixels in the order that it was trained with."""
    mean, std = (torch.tensor(preprocessor[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        return model((images - mean) / std).softmax(1)[0]


def run_printed_lines(capsys, monkeypatch, folder):
    """Run what the tool printed in the folder with the picture, and return what it printed and the inferencer."""
    lines = capsys.readouterr().out.partition('In Python:\n\n')[2]
    monkeypatch.chdir(folder)
    scope = {}
    exec(lines, scope)
    return capsys.readouterr().out.splitlines()[-1], scope['predict']


@pytest.mark.parametrize(
    'dataset, preprocessor, order',
    [
        (CIFAR, COLOURS, [0, 1, 2]),
        (FOLDER, {**COLOURS, 'to_rgb': True}, [0, 1, 2]),
        (FOLDER, COLOURS, [2, 1, 0]),
    ],
    ids=['CIFAR, RGB arrays', 'files turned to RGB', 'files in BGR'],
)
def test_exported_student_names_the_class_of_an_image_file(
    students, tmp_path, capsys, monkeypatch, dataset, preprocessor, order
):
    export.main(save_run(tmp_path, students[3], dataset, preprocessor))
    expected = scores(students[3], picture(tmp_path, 32, 32, 3)[..., order].permute(2, 0, 1)[None], preprocessor)
    said, predict = run_printed_lines(capsys, monkeypatch, tmp_path)
    assert said.endswith(NAMES[expected.argmax()])  # behind mmpretrain's progress bar
    torch.testing.assert_close(torch.from_numpy(predict('picture.jpg')[0]['pred_scores']), expected)


def test_exported_student_of_gray_arrays_reads_files_of_any_size(students, tmp_path, capsys, monkeypatch):
    dataset = dict(type='mmwsl.Digits', split='test', pipeline=[dict(type='PackInputs')])
    export.main(save_run(tmp_path, students[1], dataset, dict(mean=[4.9], std=[6.0]), channels=1))
    gray = picture(tmp_path, 8, 8)  # the digits end at 16, a file at 255
    expected = scores(students[1], gray[None, None] * 16 / 255, dict(mean=[4.9], std=[6.0]))
    _, predict = run_printed_lines(capsys, monkeypatch, tmp_path)
    torch.testing.assert_close(torch.from_numpy(predict('picture.jpg')[0]['pred_scores']), expected)
    Image.open('picture.jpg').convert('RGB').resize((80, 60)).save('picture.jpg', format='PNG')
    assert predict('picture.jpg')[0]['pred_scores'].shape == (6,)


def test_exported_student_moves_with_its_config(students, tmp_path, capsys):
    export.main([*save_run(tmp_path, students[3], CIFAR, COLOURS, names=()), '--out-path', str(tmp_path / 'a/net.pth')])
    assert 'names of its classes are not known' in (said := capsys.readouterr().out) and "'pred_label'" in said
    (tmp_path / 'a').rename(tmp_path / 'b')
    cfg = Config.fromfile(tmp_path / 'b/net.py')
    assert cfg.load_from == str(tmp_path / 'b/net.pth') and 'metainfo' not in cfg.test_dataloader.dataset


@pytest.mark.parametrize(
    'change, options, message',
    [
        (lambda kept: kept['state_dict'].pop('architecture.head.fc.bias'), [], r'missing: head\.fc\.bias.*by --config'),
        (
            lambda kept: kept['meta'].update(dataset_meta=dict(classes=NAMES[:5])),
            [],
            r'names 5 classes \(ant, bee, cat, \.\.\.\), and its student predicts 6.*by --config',
        ),
        (
            lambda kept: None,
            ['--config', str(ROOT / 'configs/wsl_r56_r20_cifar100.py')],
            'of depth 20 with 100 classes',
        ),
    ],
    ids=['a key less', 'a name less', 'another config'],
)
def test_student_that_mmpretrain_would_load_in_part_is_refused(students, tmp_path, change, options, message):
    (path,) = save_run(tmp_path, students[3], CIFAR, COLOURS)
    change(kept := torch.load(path))
    torch.save(kept, path)
    with pytest.raises(ValueError, match=message):
        export.main([path, *options])
    assert [file.name for file in tmp_path.iterdir()] == ['epoch_1.pth']


@pytest.mark.parametrize(
    'changes, reason',
    [
        (dict(cfg='import os\nx = os.listdir()'), 'no config in its checkpoint: give --config'),
        (dict(cfg="model = dict(type=print('run'))"), 'no config in its checkpoint: give --config'),
        (dict(cfg=None), 'no config in its checkpoint: give --config'),
        (
            dict(dataset=dict(type='Stars', pipeline=[dict(type='PackInputs')])),
            'come from Stars, and it is not known how to',
        ),
        (dict(kind='mmengine.ToyModel'), 'it is a mmengine.ToyModel, and'),
        (dict(kind='EncoderDecoder'), 'a EncoderDecoder'),
    ],
    ids=['a program', 'a call', 'none', 'unknown images', 'unknown network', 'a segmentor'],
)
def test_student_without_a_config_is_exported_alone(students, tmp_path, capsys, changes, reason):
    changes = dict(changes)
    dataset = changes.pop('dataset', CIFAR)
    export.main(save_run(tmp_path, students[3], dataset, COLOURS, **changes))
    assert reason in (said := capsys.readouterr().out) and not said.startswith('run')
    kept = torch.load(tmp_path / 'epoch_1_student.pth')
    assert kept['meta']['dataset_meta']['classes'] == NAMES
    torch.testing.assert_close(kept['state_dict'], dict(students[3].state_dict()))


def test_another_config_is_not_overwritten(students, tmp_path):
    (path,) = save_run(tmp_path, students[3], CIFAR, COLOURS)
    (tmp_path / 'wsl.py').write_text('model = 1')
    with pytest.raises(FileExistsError, match=r'wsl\.py exists already.*with --out-path'):
        export.main([path, '--out-path', str(tmp_path / 'wsl.pth')])
    assert not (tmp_path / 'wsl.pth').exists()


@pytest.mark.parametrize('dataset, order', [(CIFAR, [0, 1, 2]), (FOLDER, [2, 1, 0])], ids=['RGB', 'BGR'])
def test_onnx_takes_rgb_pixels(students, tmp_path, dataset, order):
    onnxruntime = pytest.importorskip('onnxruntime', reason="needs the extra 'onnx'")
    pytest.importorskip('onnxscript', reason="needs the extra 'onnx'")
    dataset = {
        **dataset,
        'pipeline': [*dataset['pipeline'][:-1], dict(type='Resize', scale=(32, 32)), dict(type='PackInputs')],
    }
    export.main([*save_run(tmp_path, students[3], dataset, COLOURS), '--onnx'])
    session = onnxruntime.InferenceSession(tmp_path / 'epoch_1_student.onnx', providers=['CPUExecutionProvider'])
    images = picture(tmp_path, 32, 32, 3).permute(2, 0, 1)[None]
    (logits,) = session.run(['logits'], {'images': images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(logits).softmax(1)[0], scores(students[3], images[:, order], COLOURS), rtol=1e-3, atol=1e-5
    )
    assert session.get_modelmeta().custom_metadata_map['classes'] == '["ant", "bee", "cat", "dog", "eel", "fox"]'


def test_onnx_without_its_packages_names_the_extra(students, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'onnxruntime is not installed\. Install mmwsl\[onnx\]'):
        export.main([*save_run(tmp_path, students[3], CIFAR, COLOURS), '--onnx'])
