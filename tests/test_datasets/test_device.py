import collections

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmwsl.datasets.device import DeviceDataset, crop_and_flip, draw, identity_collate
from mmwsl.datasets.views import View, ViewSampler
from mmwsl.engine import check_data
from tests.tiny import ROOT, batch, digits_config, network, on_device, run_digits, save_teacher, tool

PACKED = [dict(type='PackInputs')]
DIGITS = dict(type='mmwsl.Digits', split='train', pipeline=PACKED)


def digits(**kwargs):
    init_default_scope('mmpretrain')
    return DATASETS.build(dict(type='mmwsl.DeviceDataset', dataset=DIGITS, device='cpu', **kwargs))


def views(count, epoch=0, seed=0):
    return [View(image, epoch, seed) for image in range(count)]


def chi_square(counts, expected):
    return float(((np.asarray(counts) - expected) ** 2 / expected).sum())


def test_holds_the_images_and_labels_of_the_dataset():
    init_default_scope('mmpretrain')
    plain, device = DATASETS.build(DIGITS), digits()
    assert len(device) == len(plain) == 600
    assert device.metainfo['classes'] == plain.metainfo['classes']
    found = device.__getitems__([5, 599])
    for image, sample, i in zip(found['inputs'], found['data_samples'], (5, 599)):
        torch.testing.assert_close(image, plain[i]['inputs'], rtol=0, atol=0)
        torch.testing.assert_close(sample.gt_label, plain[i]['data_samples'].gt_label, rtol=0, atol=0)
        assert sample.sample_idx == i
    torch.testing.assert_close(device[View(5, 3, 1)]['inputs'], plain[5]['inputs'], rtol=0, atol=0)


def test_views_are_numpys():
    images = batch(size=50, channels=3)['inputs']
    top, left, flip = draw(views(50), 2, 0.5)
    assert 5 < flip.sum() < 45
    for image, view, y, x, mirrored in zip(images, crop_and_flip(images, 2, top, left, flip), top, left, flip):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))  # zeros
        expected = padded[:, y : y + 8, x : x + 8]
        np.testing.assert_array_equal(view.numpy(), expected[..., ::-1] if mirrored else expected)


def test_crop_and_flip_worked_by_hand():
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    found = crop_and_flip(image, 1, np.array([0]), np.array([1]), np.array([True]))
    assert found.tolist() == [[[[0, 0], [2, 1]]]]
    assert found.is_contiguous() and found.dtype == torch.uint8


def test_crops_of_images_that_are_not_square():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    found = crop_and_flip(images, 1, np.array([1, 2]), np.array([1, 0]), np.array([False, False]))
    torch.testing.assert_close(found[0], images[0])
    torch.testing.assert_close(found[1, :, :3, 1:], images[1, :, 1:, :5])
    assert not found[1, :, 3].any() and not found[1, :, :, 0].any()


def test_all_views_occur_alike():
    draws = np.array(draw(views(81 * 2 * 100), 4, 0.5))
    assert draws[:2].min() == 0 and draws[:2].max() == 8
    counts = collections.Counter(map(tuple, draws.T.tolist()))
    assert len(counts) == 162
    # 161 degrees of freedom: 0.1 % of uniform draws exceed 221 and 0.1 % fall below 110
    assert 110 < chi_square(list(counts.values()), 100) < 221


@pytest.mark.parametrize('field, other', [('epoch', dict(epoch=1)), ('seed', dict(seed=1))])
def test_epochs_and_seeds_draw_independently(field, other):
    first, second = (np.array(draw(views(81 * 2 * 100, **each), 4, 0.5)) for each in ({}, other))
    for kind, places in enumerate((9, 9, 2)):  # top, left, flip
        pairs = collections.Counter(zip(first[kind].tolist(), second[kind].tolist()))
        limit = {9: 125, 2: 17}[places]  # 80 and 3 degrees of freedom, 0.1 %
        assert chi_square([pairs[a, b] for a in range(places) for b in range(places)], 16200 / places**2) < limit


def test_epoch_seed_and_image_are_not_interchangeable():
    keys = [View(1, 2, 0), View(2, 1, 0), View(0, 1, 2), View(1, 0, 2), View(2, 0, 1), View(0, 2, 1)]
    draws = {tuple(np.concatenate(draw([View(*(1000 * np.array(key)))], 500, 0.5))) for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize('probability', [0.0, 0.25, 1.0])
def test_share_of_flips(probability):
    flips = draw(views(10000), 4, probability)[2]
    assert abs(flips.mean() - probability) < 0.02  # standard deviation at 0.25: 0.004


def test_a_view_depends_on_nothing_but_itself():
    dataset = digits(padding=2, flip_prob=0.5)
    whole = dataset.__getitems__(views(6))['inputs']
    parts = torch.cat([dataset.__getitems__(views(6)[at])['inputs'] for at in (slice(0, 1), slice(1, 6))])
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert not torch.equal(dataset.__getitems__(views(6, epoch=1))['inputs'], whole)


def test_plain_indices_have_no_random_views():
    with pytest.raises(ValueError, match=r'mmwsl\.ViewSampler'):
        digits(padding=2).__getitems__([0, 1])


def test_workers_are_refused():
    dataset = digits()
    loader = DataLoader(dataset, batch_size=2, num_workers=1, collate_fn=identity_collate)
    with pytest.raises(RuntimeError, match='num_workers=0'):
        next(iter(loader))


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='RandomFlip', prob=0.5),
        dict(type='RandAugment', policies=[dict(type='Equalize')], num_policies=1, magnitude_level=9),
    ],
)  # suits gray images
def test_a_random_pipeline_is_refused(transform):
    init_default_scope('mmpretrain')
    with pytest.raises(ValueError, match=rf'this one draws random numbers\. Remove(?s:.*){transform["type"]}'):
        DeviceDataset(dict(DIGITS, pipeline=[transform, *PACKED]), device='cpu')


def test_items_of_a_resample_keep_the_index_of_their_image():
    init_default_scope('mmpretrain')
    resample = dict(type='mmwsl.BootstrapDataset', seed=0, dataset=DIGITS)
    dataset, drawn = DeviceDataset(resample, padding=1, device='cpu'), DATASETS.build(resample).indices
    found = dataset.__getitems__(views(50))
    assert [sample.sample_idx for sample in found['data_samples']] == drawn[:50].tolist()


@pytest.mark.parametrize('kwargs', [dict(padding=-1), dict(flip_prob=1.5)])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=r'at least 0 and flip_prob a probability, got'):
        digits(**kwargs)


class TwoSizes:
    metainfo: dict = {}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        data = batch(1)
        return dict(inputs=data['inputs'][0, :, index:], data_samples=data['data_samples'][0])


def test_images_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r'\(1, 8, 8\) and, for image 1, \(1, 7, 8\): resize'):
        DeviceDataset(TwoSizes(), device='cpu')


def test_the_loader_hands_out_each_image_once():
    dataset = digits(padding=1, flip_prob=0.5)
    sampler = ViewSampler(dataset, shuffle=True, seed=0)
    batches = list(DataLoader(dataset, batch_size=256, sampler=sampler, collate_fn=identity_collate))
    assert [len(each['inputs']) for each in batches] == [256, 256, 88]
    assert sorted(sample.sample_idx for each in batches for sample in each['data_samples']) == list(range(600))


def test_validation_scores_the_same(tmp_path):
    scores = []
    for name, cfg in (('plain', {}), ('device', on_device())):
        torch.manual_seed(0)
        runner = Runner.from_cfg(
            digits_config(tmp_path / name, network(4), custom_hooks=[], checkpoint=dict(save_best=None), **cfg)
        )
        runner.model.load_state_dict(torch.load(save_teacher(tmp_path / 'weights.pth'))['state_dict'])
        scores.append(runner.val_loop.run())
    assert scores[0] == scores[1]


def test_missing_data_are_found_through_it(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/_base_/datasets/cifar100_bs64_device.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.dataset.update(data_root=str(tmp_path), download=False)
    with pytest.raises(FileNotFoundError, match=r'train_dataloader: CIFAR100 is not in'):
        check_data(cfg, ('train_dataloader',))


@pytest.mark.slow
def test_mmengines_compile_works_on_top(tmp_path):
    torch._dynamo.utils.counters.clear()  # what other tests compiled
    curves = []
    for name in ('plain', 'compiled'):
        torch.manual_seed(0)
        runner = run_digits(
            tmp_path / name,
            network(2),
            custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
            **on_device(compile=dict(backend='aot_eager') if name == 'compiled' else False),
        )
        curves.append(torch.tensor(runner.message_hub.get_scalar('train/loss').data[0]))
    assert len(curves[0]) == 6
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=0)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0


@pytest.mark.slow
def test_a_pair_trains_on_cifar100(tmp_path, cifar100):
    tool(
        'train.py',
        'configs/wsl_r56_r20_cifar100_device.py',
        '--no-validate',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'train_dataloader.num_batch_per_epoch=3',
        'train_cfg.max_epochs=1',
        'model.teacher_ckpt=None',
        f'train_dataloader.dataset.dataset.data_root={cifar100}',
        cwd=ROOT,
    )
    assert (tmp_path / 'epoch_1.pth').exists()


def test_a_pipeline_with_a_generator_of_its_own_is_refused():
    init_default_scope('mmpretrain')
    dataset, generator = DATASETS.build(DIGITS), np.random.default_rng(0)
    dataset.pipeline.transforms.insert(
        0, lambda results: {**results, 'img': results['img'] + generator.integers(0, 5, results['img'].shape)}
    )
    with pytest.raises(ValueError, match='this one draws random numbers'):
        DeviceDataset(dataset, device='cpu')
