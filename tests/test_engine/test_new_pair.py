from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmwsl.datasets.image_folder import inspect_folder
from mmwsl.engine.named_networks import Trial, named_network, pretrained_start, published_weights, try_network
from mmwsl.engine.new_pair import Network, check_trained, pixels_for, recipe
from mmwsl.engine.pair_configs import _code, write_pair
from mmwsl.utils import save_weights
from tests.tiny import ROOT, build, load_tool

BASES = ROOT / 'configs/_base_/models'


@pytest.fixture
def images(tmp_path):
    """A folder of three classes, not split: ten images each."""
    for label, name in enumerate(('ant', 'bee', 'cat')):
        folder = tmp_path / 'mine' / name
        folder.mkdir(parents=True)
        for number in range(10):
            pixels = np.random.default_rng([label, number]).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f'{number}.png')
    return tmp_path / 'mine'


def network(name, pixels, classes=3, batchnorm=True, start=None, training=0.03, forward=0.01):
    return Network(
        name, named_network(name, classes, pixels, BASES), Trial(training, forward, batchnorm, None), start or {}
    )


@pytest.mark.parametrize(
    'name, pixels, backbone',
    [
        ('resnet56', 32, dict(type='mmwsl.CIFARResNet', depth=56)),
        ('resnet34', 32, dict(type='ResNet_CIFAR', depth=34, num_stages=4, out_indices=(3,), style='pytorch')),
        ('resnet34', 224, dict(type='ResNet', depth=34)),
        ('resnet34_8xb32_in1k', 224, dict(type='ResNet', depth=34, num_stages=4, out_indices=(3,), style='pytorch')),
    ],
)
def test_a_name_gives_the_network_for_the_size_of_the_images(name, pixels, backbone):
    found = named_network(name, 7, pixels, BASES)
    assert found['backbone'] == backbone and found['head']['num_classes'] == 7 and 'topk' not in found['head']


@pytest.mark.parametrize('name, model', [('timm:resnet18', 'resnet18'), ('resnet10t', 'resnet10t')])
def test_a_name_of_timm_gives_its_classifier(name, model):
    assert named_network(name, 7, 224, BASES) == dict(type='TimmClassifier', model_name=model, num_classes=7)


def test_a_name_that_nobody_has_is_explained():
    with pytest.raises(
        ValueError,
        match=r"no network 'resnet57' for 32 pixels in mmwsl, mmpretrain or timm\. Did you mean resnet56 or ",
    ):
        named_network('resnet57', 7, 32, BASES)
    with pytest.raises(
        ValueError, match=r"no network 'resnet20' for 224 pixels in .*; it is one for 32 .* --pixels 32 brings"
    ):
        named_network('resnet20', 7, 224, BASES)


@pytest.mark.parametrize('name', ['resnet34', 'resnet34_8xb32_in1k'])
def test_mmpretrains_weights_of_imagenet_are_known(name):
    assert '/resnet34_8xb32_in1k_' in published_weights(name)
    assert published_weights('resnet56') is None


def test_a_trial_finds_what_does_not_fit():
    tiny = dict(type='TimmClassifier', model_name='vit_tiny_patch16_224', depth=1, num_classes=5)
    assert not try_network('vit_tiny', tiny, 224, 5).has_batchnorm
    with pytest.raises(ValueError, match=r'vit_tiny cannot be trained on 32 x 32 pixels: .*224.* try --pixels 224'):
        try_network('vit_tiny', tiny, 32, 5)
    with pytest.raises(ValueError, match=r'logits of the shape \(16, 7\), got torch.Size\(\[16, 5\]\)'):
        try_network('vit_tiny', tiny, 224, 7)


def test_recipe_follows_the_data_and_the_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    folder = SimpleNamespace(train=range(6400), val=range(1000), statistics=lambda: ([1.0], [2.0]))
    pair = network('resnet56', 32), network('resnet20', 32, training=0.012, forward=0.004)
    # an epoch: 6400 x 0.03 + 1000 x 0.01 = 202 s, and 6400 x 0.012 + 4 = 80.8 s for each of nine students; a view: 64 s
    made = recipe(
        folder, 32, *pair, minutes=200
    )  # 12,000 s, less 55: a third is 19 x 202 s, and the rest 10 x (64 + 727.2) s
    assert (made.batch, made.teacher_epochs, made.epochs, made.views, made.mean) == (64, 19, 10, 10, [1.0])
    assert made.seconds == pytest.approx(dict(teacher=3838, views=640, student=808))
    assert made.minutes(10) == 197 and '19 epochs (1 h 4 min), each student 10 epochs (13 min)' in made.describe()
    assert '10 epochs are few: 40 are usual for these images, and need --minutes 561' in made.describe()
    slow = recipe(folder, 32, *pair, minutes=9999)
    assert (slow.teacher_epochs, slow.epochs, slow.views) == (40, 40, 16)  # 4,000 steps of 64 images
    assert 'are few' not in slow.describe()
    fast = recipe(folder, 32, *pair, minutes=1)
    assert (fast.teacher_epochs, fast.epochs) == (3, 5)
    trained = recipe(folder, 32, *pair, minutes=200, is_trained=True)  # 15 x (64 + 727.2) s
    assert (trained.teacher_epochs, trained.epochs) == (0, 15) and 'teacher' not in trained.describe()
    pretrained = recipe(folder, 224, network('resnet34', 224, start=dict(a=1)), pair[1], minutes=9999)
    assert (pretrained.batch, pretrained.teacher_epochs, pretrained.epochs) == (16, 5, 10)
    assert pretrained.mean[0] == 123.675
    few = SimpleNamespace(train=range(90), val=range(9), statistics=lambda: ([1.0], [2.0]))
    assert recipe(few, 32, *pair, minutes=9999).batch == 8


def written(images, tmp_path, **kwargs):
    folder = inspect_folder(images)
    pair = network('resnet56', 32, **kwargs), network('resnet20', 32)
    write_pair(tmp_path / 'configs/mine', ROOT / 'configs', folder, recipe(folder, 32, *pair, 9999), *pair)
    return {path.stem: Config.fromfile(path) for path in (tmp_path / 'configs/mine').glob('*.py')}


def test_configs_are_one_pair(images, tmp_path):
    configs = written(images, tmp_path)
    wsl = configs['wsl']
    assert configs['student'].model == wsl.model.architecture and configs['teacher'].model == wsl.model.teacher
    assert (
        wsl.model.teacher_ckpt == f'{configs["teacher"].work_dir}/epoch_{configs["teacher"].train_cfg.max_epochs}.pth'
    )
    assert {**configs['kd'].model, 'distiller': None} == {**wsl.model, 'distiller': None}
    assert list(configs['kd'].model.distiller.distill_losses) == ['loss_kd']
    assert wsl.optim_wrapper == dict(
        optimizer=dict(  # 0.1 for 128 images
            type='SGD', lr=0.00625, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    )
    assert len({cfg.work_dir for cfg in configs.values()}) == 4
    shared = 'train_dataloader', 'val_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg'
    assert all(cfg[key] == wsl[key] for cfg in configs.values() for key in shared)


def test_images_of_a_folder_that_is_not_split_are_read_by_lists(images, tmp_path):
    cfg = written(images, tmp_path)['wsl']
    init_default_scope('mmpretrain')
    train, val = (DATASETS.build(cfg[field].dataset) for field in ('train_dataloader', 'val_dataloader'))
    paths = [[part.get_data_info(index)['img_path'] for index in range(len(part))] for part in (train.dataset, val)]
    assert [len(each) for each in paths] == [24, 6] and not set(paths[0]) & set(paths[1])
    assert val.metainfo['classes'] == ('ant', 'bee', 'cat')
    assert {path.split('/')[-2]: val.get_data_info(index)['gt_label'] for index, path in enumerate(paths[1])} == dict(
        ant=0, bee=1, cat=2
    )
    assert val[0]['inputs'].shape == (3, 32, 32)


def test_a_network_without_batchnorm_has_an_optimiser_of_its_own(images, tmp_path):
    configs = written(images, tmp_path, batchnorm=False)
    assert configs['wsl'].optim_wrapper.optimizer.type == 'SGD'
    assert configs['teacher'].optim_wrapper == dict(optimizer=dict(type='AdamW', lr=3.13e-5, weight_decay=0.05))


def test_images_of_other_sizes_are_brought_to_one(images, tmp_path):
    Image.new('RGB', (60, 40)).save(images / 'ant/wide.png')
    assert pixels_for(inspect_folder(images)) == 32
    cfg = written(images, tmp_path)['wsl']
    init_default_scope('mmpretrain')
    train = DATASETS.build(cfg.train_dataloader.dataset)
    assert {tuple(train[index]['inputs'].shape) for index in range(len(train))} == {(3, 32, 32)}


def start_of(tmp_path, name, weights):
    torch.save(dict(state_dict=weights), tmp_path / 'start.pth')
    config = named_network(name, 3, 224, BASES)
    built = build(config)
    return config, built, pretrained_start(config, built, str(tmp_path / 'start.pth'))


@pytest.mark.parametrize('name, body', [('resnet18', 'backbone'), ('timm:resnet10t', 'model')])
def test_a_pretrained_start_is_loaded_but_for_the_classifier(tmp_path, name, body):
    other = build(named_network(name, 9, 224, BASES))
    config, _, start = start_of(tmp_path, name, other.state_dict())
    begun = build({**config, **start})
    weights = [getattr(each, body).conv1 for each in (begun, other)]
    weights = [each[0].weight if isinstance(each, torch.nn.Sequential) else each.weight for each in weights]
    assert torch.equal(*weights)


def test_a_pretrained_start_of_another_network_is_refused(tmp_path):
    weights = build(named_network('resnet18', 3, 224, BASES)).state_dict()
    with pytest.raises(ValueError, match=r'start.pth lacks \d+ of 218 weights of this network.*backbone|layer'):
        start_of(tmp_path, 'resnet34', weights)


def test_a_trained_teacher_is_checked_before_anything_is_written(tmp_path):
    config = named_network('resnet20', 3, 32, BASES)
    teacher, file = Network('resnet20', config, Trial(1.0, 1.0, True, build(config)), {}), str(tmp_path / 'it.pth')
    torch.save(dict(state_dict=teacher.trial.network.state_dict()), file)
    check_trained(teacher, file, 'abc')
    save_weights(teacher.trial.network.state_dict(), file, 'acb')
    with pytest.raises(
        ValueError, match=r'classes a, c, b, in this order, and the folder has a, b, c\. --teacher-ckpt'
    ):
        check_trained(teacher, file, 'abc')
    save_weights(build(named_network('resnet20', 9, 32, BASES)).state_dict(), file)
    with pytest.raises(ValueError, match=r'9 classes.*--teacher-ckpt takes a resnet20 that predicts these 3 classes'):
        check_trained(teacher, file, 'abc')


@pytest.mark.parametrize(
    'value, text',
    [
        (dict(type='A', steps=(3,)), "dict(type='A', steps=(3,))"),
        ({'a-b': [1]}, "{'a-b': [1]}"),
        (dict(a='x' * 60, b='y' * 60), f"dict(\n    a='{'x' * 60}',\n    b='{'y' * 60}')"),
    ],
)
def test_values_are_written_as_people_do(value, text):
    assert _code(value, 0) == text and eval(text) == value


def test_the_tool_writes_configs_and_says_what_is_next(images, tmp_path, monkeypatch, capsys):
    tool = load_tool('new_pair')
    monkeypatch.chdir(tmp_path)
    images.rename('my, mine')
    monkeypatch.setattr(
        'sys.argv',
        [
            'tools/new_pair.py',
            '--data',
            'my, mine',
            '--teacher',
            'resnet20',
            '--student',
            'resnet20',
            '--minutes',
            '0.001',
        ],
    )
    tool.main()
    said = capsys.readouterr().out
    assert 'my, mine: 3 classes (ant, bee, cat)\n  24 training and 6 validation images' in said
    assert '8 images a step; teacher 3 epochs' in said and 'has learnt from others:\n  --teacher-start FILE' in said
    assert said.endswith('python tools/compare.py configs/my_mine --seeds 0 1 2 --views 5\n')
    assert [Config.fromfile(f'configs/my_mine/{name}.py').train_cfg.max_epochs for name in ('kd', 'teacher')] == [5, 3]
    with pytest.raises(SystemExit):
        tool.main()
    assert 'configs/my_mine/wsl.py exists already: choose another folder with --out' in capsys.readouterr().err
