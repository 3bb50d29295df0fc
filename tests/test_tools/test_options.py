"""The parsers of tools/train.py and tools/test.py, without training."""

import os
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from mmpretrain.datasets import CIFAR100
from PIL import Image
from torch.utils.data import DataLoader

from mmwsl.engine import check_data, explained_data, prepare_run
from tests.tiny import ROOT, load_tool


def prepared(monkeypatch, *arguments, config='wsl_digits'):
    train = load_tool('train')
    monkeypatch.setattr(sys, 'argv', ['train.py', f'configs/{config}.py', *arguments])
    args = train.parse_args()
    cfg = Config.fromfile(ROOT / args.config)
    train.apply_training_options(cfg, args)
    prepare_run(cfg, args, ('train_dataloader', 'val_dataloader'))
    return cfg


def test_work_dir_is_named_after_the_config(monkeypatch):
    assert prepared(monkeypatch).work_dir == 'work_dirs/wsl_digits'
    assert prepared(monkeypatch, '--work-dir', 'here').work_dir == 'here'


@pytest.mark.parametrize(
    'arguments, resume, load_from',
    [((), False, None), (('--resume',), True, None), (('--resume', 'a.pth'), True, 'a.pth')],
)
def test_resume(monkeypatch, arguments, resume, load_from):
    cfg = prepared(monkeypatch, *arguments)
    assert (cfg.resume, cfg.load_from) == (resume, load_from)


def test_no_validate_leaves_nothing_to_choose_a_best_checkpoint_by(monkeypatch):
    usual = Config.fromfile(ROOT / 'configs/wsl_digits.py')
    usual.default_hooks.checkpoint.save_best = 'auto'
    monkeypatch.setattr(Config, 'fromfile', lambda path: usual)
    cfg = prepared(monkeypatch, '--no-validate')
    assert cfg.val_cfg is None and cfg.val_dataloader is None and 'save_best' not in cfg.default_hooks.checkpoint


def test_options_of_the_config_win(monkeypatch):
    cfg = prepared(
        monkeypatch,
        '--cfg-options',
        'optim_wrapper.optimizer.lr=0.5',
        'train_dataloader.num_workers=2',
        'train_dataloader.persistent_workers=True',
    )
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.train_dataloader.persistent_workers


def test_white_space_that_mmengine_would_drop_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        prepared(monkeypatch, '--cfg-options', 'model.teacher_ckpt=/my models/teacher.pth')
    assert "drops the spaces within a setting, got 'model.teacher_ckpt=/my models" in capsys.readouterr().err
    assert prepared(monkeypatch, '--cfg-options', 'tta_pipeline=[1, (2, 3) ]').tta_pipeline == [1, (2, 3)]


def test_predictions_go_into_a_pickle_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['test.py', 'c.py', 'c.pth', '--out', 'a.json'])
    with pytest.raises(SystemExit):
        load_tool('test').parse_args()
    assert 'need --out FILE.pkl, got a.json: for a .json file, add --out-item metrics' in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--out-item', 'metrics'])
    assert load_tool('test').parse_args().out == 'a.json'


def test_workers_may_be_made_anew(monkeypatch):
    cfg = prepared(monkeypatch, '--no-persistent-workers', '--cfg-options', 'train_dataloader.num_workers=2')
    assert not cfg.train_dataloader.persistent_workers


def test_learning_rate_scaling_needs_its_base(monkeypatch):
    assert prepared(monkeypatch, '--auto-scale-lr').auto_scale_lr.enable
    train = load_tool('train')
    monkeypatch.setattr(sys, 'argv', ['train.py', 'x.py', '--auto-scale-lr'])
    with pytest.raises(ValueError, match='needs auto_scale_lr=dict'):
        train.apply_training_options(Config(dict()), train.parse_args())


def test_mixed_precision_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(ValueError, match='--amp needs a GPU'):
        prepared(monkeypatch, '--amp')


def test_mixed_precision_with_a_gpu(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    cfg = prepared(monkeypatch, '--amp')
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')


@pytest.mark.parametrize('option', ['--local_rank', '--local-rank'])
def test_both_spellings_of_local_rank(monkeypatch, option):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    prepared(monkeypatch, option, '3')
    assert os.environ.pop('LOCAL_RANK') == '3'


def test_local_rank_of_mpi(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', '5')
    prepared(monkeypatch)
    assert os.environ.pop('LOCAL_RANK') == '5'


@pytest.mark.parametrize('rank', ['RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID'])
def test_the_first_process_fetches_for_all(tmp_path, monkeypatch, rank):
    for name in ('RANK', 'OMPI_COMM_WORLD_RANK', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(rank, '1')
    check_data(cifar(tmp_path, download=False), ('train_dataloader',))
    monkeypatch.setenv(rank, '0')
    with pytest.raises(FileNotFoundError):
        check_data(cifar(tmp_path, download=False), ('train_dataloader',))


def cifar(tmp_path, **kwargs):
    dataset = dict(type='mmwsl.SeededViews', dataset=dict(type='CIFAR100', data_root=str(tmp_path), **kwargs))
    return Config(dict(train_dataloader=dict(dataset=dataset)))


def test_missing_cifar_names_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'cifar-100-python/ with the files train, test, meta\. Set download'):
        check_data(cifar(tmp_path, download=False), ('train_dataloader',))


def test_failed_download_names_the_layout_and_the_source(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('mmpretrain.datasets.cifar.download_and_extract_archive', fail)
    with pytest.raises(FileNotFoundError, match=r'Downloading it failed \(no network\).*cifar-100-python\.tar\.gz'):
        check_data(cifar(tmp_path), ('train_dataloader',))


def test_cifar_that_is_there_is_compared_with_what_was_published(tmp_path, monkeypatch):
    (tmp_path / 'cifar-100-python').mkdir()
    for name in ('train', 'test', 'meta'):
        (tmp_path / 'cifar-100-python' / name).touch()
    of_nothing = 'd41d8cd98f00b204e9800998ecf8427e'
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', of_nothing]])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', of_nothing]])
    check_data(cifar(tmp_path), ('train_dataloader',))
    (tmp_path / 'cifar-100-python' / 'test').write_text('cut short')
    with pytest.raises(ValueError, match='cifar-100-python is damaged: test are not the published files'):
        check_data(cifar(tmp_path), ('train_dataloader',))


def own_images(tmp_path, files):
    for file in files:
        (tmp_path / 'train' / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / file).write_text('' if 'empty' in file else 'image')
    dataset = dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train')
    return Config(dict(train_dataloader=dict(dataset=dict(type='mmwsl.SeededViews', dataset=dataset))))


@pytest.mark.parametrize(
    'files, error, message',
    [
        (
            [],
            FileNotFoundError,
            r'train does not exist. Expected: one folder for each class[^I]*data_prefix to its location',
        ),
        (['a/1.png', '.ipynb_checkpoints/1.png'], ValueError, r'would become a class: .ipynb_checkpoints. Delete'),
        (
            ['a/1.png', 'a/empty_1.png', 'b/empty_2.png', 'b/empty_3.png', 'b/empty_4.png'],
            ValueError,
            r'empty files are no images: .*a/empty_1.png, .*b/empty_3.png and 1 more',
        ),
        (['a/1.png', 'b/.empty'], None, ''),
    ],
    ids=['missing', 'hidden folder', 'empty files', 'fine'],
)
def test_folder_of_images_is_looked_at(tmp_path, files, error, message):
    cfg = own_images(tmp_path, files)
    if error is None:
        check_data(cfg, ('train_dataloader',))
        return
    with pytest.raises(error, match=message):
        check_data(cfg, ('train_dataloader',))


def pictures(tmp_path, sizes, modes=('RGB', 'RGB')):
    """A config on two images of one class, of these sizes."""
    (tmp_path / 'train/cat').mkdir(parents=True)
    for name, size, mode in zip('ab', sizes, modes):
        Image.new(mode, size).save(tmp_path / f'train/cat/{name}.png')
    dataset = dict(
        type='CustomDataset',
        data_root=str(tmp_path),
        data_prefix='train',
        pipeline=[dict(type='LoadImageFromFile', color_type='unchanged'), dict(type='PackInputs')],
    )
    init_default_scope('mmpretrain')
    return Config(dict(train_dataloader=dict(dataset=dict(type='mmwsl.SeededViews', dataset=dataset))))


@pytest.mark.parametrize(
    'sizes, modes, message',
    [
        (
            ((32, 30), (40, 50)),
            ('RGB', 'RGB'),
            r'got 32 x 30 pixels in 3 channels of .*cat/a.png and 40 x 50 pixels in 3 '
            r"channels of .*cat/b.png. Add dict\(type='Resize', scale=.* before PackInputs",
        ),
        (
            ((32, 32), (32, 32)),
            ('RGB', 'L'),
            r'got 32 x 32 pixels in 3 channels of .*cat/a.png and 32 x 32 pixels in 1 '
            r"channel of .*cat/b.png. Read all images with the same channels: dict\(type='LoadImageFromFile'",
        ),
    ],
)
@pytest.mark.parametrize('workers', [0, 1])
def test_images_of_several_sizes_are_named(tmp_path, sizes, modes, message, workers):
    cfg = pictures(tmp_path, sizes, modes)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=default_collate)
    with (
        pytest.raises(ValueError, match=f'^train_dataloader: the images of a batch should have one size, {message}'),
        explained_data(cfg, ('val_dataloader', 'train_dataloader')),
    ):
        list(loader)


def test_images_of_several_sizes_are_cropped_for_segmentation(monkeypatch):
    scenes = [
        dict(
            inputs=torch.zeros(3, 30, width),
            data_samples=BaseDataElement(metainfo=dict(img_path=f'{width}.png'), gt_sem_seg=PixelData()),
        )
        for width in (40, 41)
    ]
    monkeypatch.setattr('mmwsl.engine.data_checks.DATASETS.build', lambda config: scenes)
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='Scenes'))))
    with (
        pytest.raises(
            ValueError,
            match=r'got 40 x 30 pixels in 3 channels of 40.png and 41 x 30 pixels in 3 channels of 41.png. Add '
            r"dict\(type='mmseg.RandomCrop', .* before PackSegInputs .* data_preprocessor.size=.* pads smaller images$",
        ),
        explained_data(cfg, ('train_dataloader',)),
    ):
        torch.stack([scene['inputs'] for scene in scenes])


@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_is_no_image_is_named(tmp_path, workers):
    cfg = pictures(tmp_path, ((32, 32), (32, 32)), ('RGB', 'RGB'))
    broken = next(tmp_path.rglob('b.png'))
    broken.write_bytes(b'<html>not found</html>')
    loader = DataLoader(
        DATASETS.build(cfg.train_dataloader.dataset), batch_size=2, num_workers=workers, collate_fn=default_collate
    )
    with (
        pytest.raises(ValueError, match=f'^{broken} does not open as an image: .* Copy it again or delete it'),
        explained_data(cfg, ('train_dataloader',)),
    ):
        list(loader)
    with pytest.raises(AssertionError, match='^other$'), explained_data(cfg, ('train_dataloader',)):
        raise AssertionError('other')


@pytest.mark.parametrize('text', ['stack expects each tensor to be equal size, of features', 'something else'])
def test_errors_of_other_things_stay_as_they_are(tmp_path, text):
    cfg, error = pictures(tmp_path, ((32, 32), (32, 32))), RuntimeError(text)
    with pytest.raises(RuntimeError) as raised, explained_data(cfg, ('train_dataloader',)):
        raise error
    assert raised.value is error


def test_missing_folder_of_boxes_says_how_to_get_it(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/det/student_bccd.py')
    dataset = cfg.train_dataloader.dataset.dataset
    dataset.data_root = f'{tmp_path}/bccd/'
    with pytest.raises(
        FileNotFoundError,
        match=rf'train_dataloader: {tmp_path}/bccd/ does not exist. Set train_dataloader.dataset...data_root to its '
        'location, or fetch it: python tools/fetch_bccd.py$',
    ):
        check_data(cfg, ('train_dataloader',))
    dataset.data_root = f'{tmp_path}/cells'
    with pytest.raises(FileNotFoundError, match='data_root to its location$'):
        check_data(cfg, ('train_dataloader',))
    for there in (str(tmp_path), 's3://cells', None):
        dataset.data_root = there
        check_data(cfg, ('train_dataloader',))


def test_missing_imagenet_names_the_layout(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/wsl_r34_r18_in1k.py')
    cfg.train_dataloader.dataset.dataset.data_root = str(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=rf'{tmp_path}/train does not exist.*one folder for each class.*cannot be '
        'downloaded',
    ):
        check_data(cfg, ('train_dataloader',))
    (tmp_path / 'train').mkdir()
    check_data(cfg, ('train_dataloader',))


def chosen(monkeypatch, *arguments, config='wsl_digits'):
    test = load_tool('test')
    monkeypatch.setattr(sys, 'argv', ['test.py', str(ROOT / f'configs/{config}.py'), *arguments])
    args = test.parse_args()
    cfg = Config.fromfile(args.config)
    test.choose_model(cfg, args)
    return cfg.model, args.checkpoint


def test_a_student_is_tested_without_its_teacher(monkeypatch):
    model, checkpoint = chosen(monkeypatch, 'a.pth')
    assert model.type == 'ImageClassifier' and model.backbone.depth == 8 and checkpoint == 'a.pth'


def test_a_teacher_is_tested_with_its_own_checkpoint(monkeypatch):
    model, checkpoint = chosen(monkeypatch, '--teacher')
    assert model.backbone.depth == 14 and checkpoint == 'checkpoints/digits_teacher.pth'


def test_config_without_a_teacher_says_so(monkeypatch):
    with pytest.raises(ValueError, match='has no teacher: its model is a ImageClassifier'):
        chosen(monkeypatch, '--teacher', config='vanilla/digits_student')


def test_nothing_to_test_is_an_error_of_use(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        chosen(monkeypatch)
    assert 'a checkpoint is needed' in capsys.readouterr().err


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickled_dataset_is_not_read_unless_its_checksum_matches(tmp_path):
    _RunsCode.target = str(tmp_path / 'it-ran')
    folder = tmp_path / 'cifar-100-python'
    folder.mkdir()
    for name in ('train', 'test', 'meta'):
        (folder / name).write_bytes(pickle.dumps(_RunsCode()))
    with pytest.raises(RuntimeError, match='Cannot find CIFAR100'):
        CIFAR100(data_root=str(tmp_path), split='train', download=False)
    assert not (tmp_path / 'it-ran').exists()


def test_only_the_first_process_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setattr('mmpretrain.datasets.cifar.download_and_extract_archive', lambda *args, **kwargs: 1 / 0)
    check_data(cifar(tmp_path), ('train_dataloader',))


def test_the_preprocessor_of_the_algorithm_reaches_the_network_that_is_tested():
    cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', mean=[1.0], std=[2.0])
    load_tool('test').choose_model(cfg, SimpleNamespace(teacher=False, config='', checkpoint='a.pth'))
    assert cfg.model.data_preprocessor.mean == [1.0]
