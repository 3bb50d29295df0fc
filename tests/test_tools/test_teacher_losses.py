import os
import sys
from math import log

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from torch.nn import functional as F

from mmwsl.cache import CacheError, TeacherLosses
from mmwsl.cache.fingerprint import files_hash
from mmwsl.datasets import Fold
from mmwsl.engine import calibrate, measure_losses
from tests.tiny import (
    PREPROCESSOR,
    ROOT,
    build,
    digits_config,
    distillation,
    load_tool,
    network,
    on_device,
    save_teacher,
    tool,
)

NOISE = dict(type='mmwsl.LabelNoise', prob=0.3, num_classes=10, seed=2)
PACK = dict(type='PackInputs')


def config(model=None, pipeline=(PACK,), wrapper=None, indices=60):
    """Of a run on some digits, whose dataset may stand in a further wrapper."""
    cfg = digits_config('work_dirs/test', model or network(2))
    views = cfg.train_dataloader.dataset
    views.dataset.update(pipeline=list(pipeline), indices=indices)
    if wrapper:
        views.dataset = dict(**wrapper, dataset=views.dataset)
    return cfg


def constant(path, probs):
    """Checkpoint of a network whose logits are log(probs), whatever the image."""
    weights = build(network(2)).state_dict()
    weights['head.fc.weight'].zero_()
    weights['head.fc.bias'].copy_(torch.as_tensor(probs).log())
    torch.save(dict(state_dict=weights), path)
    return str(path)


@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """Checkpoints of three networks: the k-th gives class c the probability (1 + k c) / (10 + 45 k)."""
    folder = tmp_path_factory.mktemp('odd')
    classes = torch.arange(10)
    return [constant(folder / f'{k}.pth', (1 + k * classes) / (10 + 45 * k)) for k in range(3)]


def losses_of(path, images, labels, channels=2):
    """By another way: one image after the other."""
    net = build(network(channels))
    net.load_state_dict(torch.load(path)['state_dict'])
    net.eval()
    with torch.no_grad():
        return [
            F.cross_entropy(net((image[None].float() - 4.9) / 6.0)[0].double(), torch.tensor(label)).item()
            for image, label in zip(images, labels)
        ]


# ---- losses


@pytest.mark.parametrize('kind', ['network', 'distillation', 'device'])
def test_losses_are_those_of_each_image_with_the_label_of_training(tmp_path, kind):
    path, crops = save_teacher(tmp_path / 'a.pth', network(4)), dict(type='RandomCrop', crop_size=8, padding=4)
    model = network(4) if kind == 'network' else distillation(teacher_ckpt=path)
    cfg = config(model, [NOISE, crops, PACK])  # crops are of training alone
    cfg.val_dataloader.batch_size = 25
    train = DATASETS.build(dict(cfg.train_dataloader.dataset.dataset, pipeline=[NOISE, PACK]))
    if kind == 'device':
        cfg.merge_from_dict(on_device())
        cfg.train_dataloader.dataset.dataset.update(pipeline=[NOISE, PACK], indices=60)
    found, _ = measure_losses(cfg, [path] if kind == 'network' else [])
    items = [train[place] for place in range(60)]
    labels = [item['data_samples'].gt_label.item() for item in items]
    assert found.labels.tolist() == labels != [train.get_data_info(place)['gt_label'] for place in range(60)]
    expected = losses_of(path, [item['inputs'] for item in items], labels, channels=4)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4)
    assert found.about == dict(
        kind='teacher', tool='tools/teacher_losses.py', config='digits_student.py', weights=files_hash([path])
    )
    found.check(DATASETS.build(cfg.train_dataloader.dataset))


def test_share_of_images_that_are_right(odd):
    cfg = config(pipeline=[NOISE, PACK])
    found, top1 = measure_losses(cfg, [odd[2]])  # says 9, whatever it sees
    assert top1 == (found.labels == 9).sum() / 60 > 0
    np.testing.assert_allclose(found.losses, [log(100 / (1 + 2 * label)) for label in found.labels], rtol=1e-6)


def test_a_loss_of_nearly_nothing_is_not_lost(tmp_path):
    """exp(-40) is below what float32 leaves of 1."""
    path = constant(tmp_path / 'a.pth', torch.full((10,), -40.0).exp().index_fill(0, torch.tensor([3]), 1))
    found, _ = measure_losses(config(), [path])
    np.testing.assert_allclose(found.losses[found.labels == 3], 9 * np.exp(-40.0), rtol=1e-5)
    np.testing.assert_allclose(found.losses[found.labels != 3], 40, rtol=1e-5)


@pytest.mark.parametrize('wrapper', [dict(type='mmwsl.BootstrapDataset', seed=0), dict(type='mmwsl.Fold', folds=3)])
def test_each_image_of_the_training_set_is_asked_even_if_a_wrapper_leaves_it_out(odd, wrapper):
    cfg = config(wrapper=wrapper)
    found, _ = measure_losses(cfg, odd[:1])
    np.testing.assert_allclose(found.losses, [log(10)] * 60, rtol=1e-6)
    found.check(DATASETS.build(cfg.train_dataloader.dataset))


def test_an_ensemble_is_asked_with_its_own_checkpoints(odd):
    ensemble = dict(type='mmwsl.EnsembleTeacher', models=[network(2)] * 2, ckpts=odd[:2])
    found, _ = measure_losses(config(distillation(teacher=ensemble)))
    expected = [-log((1 / 10 + (1 + label) / 55) / 2) for label in found.labels]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    assert found.about['weights'] == files_hash(odd[:2])


def test_a_preprocessor_of_the_student_is_the_teachers_too(tmp_path):
    path = save_teacher(tmp_path / 'a.pth', network(4))
    expected, _ = measure_losses(config(distillation()), [path])
    cfg = config(distillation(architecture=network(2, data_preprocessor=PREPROCESSOR), data_preprocessor=None))
    cfg.data_preprocessor = None
    np.testing.assert_array_equal(measure_losses(cfg, [path])[0].losses, expected.losses)


# ---- out of fold


@pytest.mark.parametrize('wrapper, seed', [(None, 0), (dict(type='mmwsl.Fold', folds=3, fold=1, seed=5), 5)])
def test_each_image_is_asked_of_the_network_that_did_not_see_it(odd, wrapper, seed):
    found, _ = measure_losses(config(wrapper=wrapper), odd, out_of_fold=True)
    unseen_by = np.full(60, -1)
    for k in range(3):
        seen = Fold(range(60), k, 3, seed=seed).indices
        unseen_by[np.setdiff1d(range(60), seen)] = k
    assert np.bincount(unseen_by).tolist() == [20, 20, 20]
    expected = [log((10 + 45 * k) / (1 + k * label)) for k, label in zip(unseen_by, found.labels)]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    assert found.about == dict(
        kind='out of fold',
        tool='tools/teacher_losses.py',
        config='digits_student.py',
        weights=files_hash(odd),
        folds='3',
        seed=str(seed),
    )


def test_folds_need_a_checkpoint_each(odd):
    with pytest.raises(ValueError, match='5 folds need as many checkpoints, in order, got 3'):
        measure_losses(config(wrapper=dict(type='mmwsl.Fold')), odd, out_of_fold=True)


@pytest.mark.parametrize(
    'wrapper, names',
    [
        (dict(type='mmwsl.BootstrapDataset', seed=0), 'BootstrapDataset'),
        (dict(type='RepeatDataset', times=2), 'RepeatDataset'),
    ],
)
def test_folds_of_something_else_than_the_training_set(odd, wrapper, names):
    with pytest.raises(ValueError, match=f'folds should be of the training set itself, .* got {names}. Remove'):
        measure_losses(config(wrapper=wrapper), odd, out_of_fold=True)
    folded = config(wrapper=wrapper)
    folded.train_dataloader.dataset.dataset = dict(type='mmwsl.Fold', dataset=folded.train_dataloader.dataset.dataset)
    with pytest.raises(ValueError, match=f'got Fold around {names}. Remove'):
        measure_losses(folded, odd, out_of_fold=True)


# ---- what no file can serve


def mixing_network(**kwargs):
    return config(network(2, train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)), **kwargs))


def mixing_preprocessor():
    cfg = config(distillation())
    cfg.model.data_preprocessor = dict(cfg.model.data_preprocessor, batch_augments=dict(augments=[dict(type='CutMix')]))
    return cfg


def mixing_student():
    return config(distillation(architecture=network(2, train_cfg=dict(augments=[dict(type='CutMix')]))))


def mixing_pipeline():
    return config(pipeline=[dict(type='mmdet.Mosaic'), PACK])


@pytest.mark.parametrize(
    'make, name',
    [
        (mixing_network, 'Mixup'),
        (mixing_preprocessor, 'CutMix'),
        (mixing_student, 'CutMix'),
        (mixing_pipeline, 'mmdet.Mosaic'),
    ],
)
def test_mixed_labels_are_refused(odd, make, name):
    with pytest.raises(ValueError, match=f'{name} mixes images and their labels .* Leave {name} out'):
        measure_losses(make(), odd[:1])
    with pytest.raises(ValueError, match=f'{name} mixes'):
        calibrate(make(), odd)


def test_mixing_can_be_left_out(odd):
    cfg = mixing_network()
    cfg.merge_from_dict({'model.train_cfg': None})
    assert len(measure_losses(cfg, odd[:1])[0].losses) == 60


def test_a_teacher_that_was_trained_on_mixtures_teaches_a_student_that_is_not(odd):
    teacher = network(2, train_cfg=dict(augments=dict(type='Mixup', alpha=0.2)))
    assert len(measure_losses(config(distillation(teacher=teacher)), odd[:1])[0].losses) == 60


def test_joined_datasets_are_refused(odd):
    cfg = config()
    views = cfg.train_dataloader.dataset
    views.dataset = dict(type='ConcatDataset', datasets=[views.dataset] * 2)
    with pytest.raises(ValueError, match='a ConcatDataset uses the same indices'):
        measure_losses(cfg, odd[:1])


def test_an_image_that_cannot_be_read_is_named(odd):
    cfg = config()
    # mmengine takes another image, by chance
    cfg.val_dataloader.dataset.pipeline = [lambda results: results if results['sample_idx'] != 7 else None, PACK]
    with pytest.raises(RuntimeError, match=r'2 of 60 images were not read exactly once \(image \d+: [02] times\)'):
        measure_losses(cfg, odd[:1])


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(val_dataloader=None), 'read by the validation pipeline, and this config has none'),
        (dict(model=dict(teacher_ckpt=None)), 'names no teacher_ckpt: give the checkpoint'),
    ],
)
def test_config_that_lacks_something(change, message):
    cfg = config(distillation(teacher_ckpt='a.pth'))
    cfg.merge_from_dict(change)
    with pytest.raises(ValueError, match=message):
        measure_losses(cfg)


def test_a_network_alone_needs_its_checkpoint():
    with pytest.raises(ValueError, match=r'digits_student\.py is the config of a network alone\. Give its checkpoint'):
        measure_losses(config())


# ---- calibration


@pytest.fixture(scope='module')
def sharpened(tmp_path_factory):
    """For each of three folds with seed 0: frequencies of its classes, three times too sharp."""
    folder = tmp_path_factory.mktemp('sharpened')
    data = DATASETS.build(dict(type='mmwsl.Digits'))
    found = []
    for k in range(3):
        held_out = Fold(data, k, 3, held_out=True)
        counts = np.bincount([held_out.get_data_info(place)['gt_label'] for place in range(200)], minlength=10)
        found.append(constant(folder / f'{k}.pth', torch.from_numpy(counts / 200).pow(3)))
    return found


def test_the_temperature_is_that_of_all_held_out_images(sharpened):
    found = calibrate(config(indices=600), sharpened)
    assert found.tau == pytest.approx(3, rel=1e-4) and found.images == 600 and found.after < found.before
    shuffled = calibrate(config(indices=600), sharpened[::-1])
    assert abs(shuffled.tau - 3) > 0.01


def test_the_temperature_of_one_fold(sharpened):
    cfg = config(indices=600, wrapper=dict(type='mmwsl.Fold', folds=3))
    found = calibrate(cfg, sharpened[1:2], fold=1)
    assert found.tau == pytest.approx(3, rel=1e-4) and found.images == 200
    with pytest.raises(ValueError, match='the network is no better than chance on them'):
        calibrate(cfg, sharpened[1:2], fold=0)


def test_a_fold_without_folds(sharpened):
    with pytest.raises(ValueError, match='--fold needs the number of folds, and this config has no Fold'):
        calibrate(config(), sharpened[:1], fold=0)


# ---- the tool


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['a.pth'], 'one of the arguments --out --calibrate is required'),
        (['a.pth', '--out', 'f', '--calibrate'], 'not allowed with argument'),
        (['a.pth', 'b.pth', '--out', 'f'], '--folds and several checkpoints belong together, got 2 without it'),
        (['a.pth', '--folds', '--out', 'f'], '--folds and several checkpoints belong together, got 1 with it'),
        (['a.pth', '--fold', '1', '--out', 'f'], '--fold leaves all folds but one out: give --folds'),
        (['a.pth', '--calibrate'], 'images that a network has not seen: give --folds, or --fold K'),
        (['a.pth', 'b.pth', '--folds', '--fold', '1', '--calibrate'], 'not allowed with argument'),
    ],
)
def test_wrong_options(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, 'argv', ['teacher_losses.py', 'config.py', *arguments])
    with pytest.raises(SystemExit):
        load_tool('teacher_losses').parse_args()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    'arguments',
    [
        ['--folds', 'c.py', 'a.pth', 'b.pth', '--out', 'f'],
        ['c.py', '--folds', 'a.pth', 'b.pth', '--out', 'f'],
        ['c.py', 'a.pth', '--out', 'f', 'b.pth', '--folds'],
    ],
)
def test_options_may_stand_anywhere(monkeypatch, arguments):
    monkeypatch.setattr(sys, 'argv', ['teacher_losses.py', *arguments])
    args = load_tool('teacher_losses').parse_args()
    assert (args.config, args.checkpoints, args.folds, args.out) == ('c.py', ['a.pth', 'b.pth'], True, 'f')


def test_calibration_is_told_as_a_setting(monkeypatch, capsys, tmp_path, sharpened):
    config(indices=600).dump(tmp_path / 'c.py')
    arguments = ['--folds', str(tmp_path / 'c.py'), *sharpened, '--calibrate']
    monkeypatch.setattr(sys, 'argv', ['teacher_losses.py', *arguments])
    load_tool('teacher_losses').main()
    told = capsys.readouterr().out
    assert 'T = 3 fits 600 held-out images best: their mean loss is ' in told
    assert "weighting=dict(type='mmwsl.WSLWeighting', teacher_tau=3)" in told


@pytest.mark.slow
def test_the_whole_tool_writes_the_file_that_it_names(tmp_path, odd):
    cfg = config(distillation(teacher=network(2), teacher_ckpt=odd[1]))
    cfg.dump(tmp_path / 'pair.py')
    done = tool(
        'teacher_losses.py',
        tmp_path / 'pair.py',
        '--out',
        'new/l.npz',
        '--cfg-options',
        'train_dataloader.dataset.dataset.indices=50',
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    found = TeacherLosses.load(tmp_path / 'new/l.npz')
    expected = [log(55 / (1 + label)) for label in found.labels]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-6)
    top1 = 100 * np.mean(found.labels == 9)
    assert (
        f'L_t of 50 images (teacher): mean {np.mean(expected):.4g}, median {np.median(expected):.4g}, {top1:.2f} % '
        'top-1. In new/l.npz.'
    ) in done.stdout
    assert "weighting=dict(type='mmwsl.WSLWeighting', teacher_losses='new/l.npz')" in done.stdout
    with pytest.raises(CacheError, match='length is 50 in the file and 60 here'):
        found.check(DATASETS.build(cfg.train_dataloader.dataset))
