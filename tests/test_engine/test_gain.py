import json
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmwsl.engine import gain
from mmwsl.engine.hooks import CheckTeacherHook
from mmwsl.engine.ratings import Figure
from tests.test_engine.test_hooks.test_best_checkpoint_hook import scripted
from tests.tiny import ROOT, distillation


def config(name, **changed):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.merge_from_dict(changed)
    return cfg


@pytest.mark.parametrize(
    'taught, by_itself',
    [
        ('wsl_digits', 'vanilla/digits_student'),
        ('kd_digits', 'vanilla/digits_student'),
        ('wsl_r56_r20_cifar100', 'vanilla/r20_cifar100'),
        ('wsl_r56_r20_cifar100_cached', 'vanilla/r20_cifar100'),
        ('seg/wsl_digits-seg', 'seg/student_digits-seg'),
        ('det/wsl_digits-det', 'det/student_digits-det'),
        ('multi/wsl_digits-multi', 'multi/student_digits-multi'),
    ],
)
def test_a_student_with_and_without_a_teacher_is_the_same(taught, by_itself):
    assert gain.setup(config(taught)) == gain.setup(config(by_itself))


@pytest.mark.parametrize(
    'changed',
    [
        {'optim_wrapper.optimizer.lr': 0.2},
        {'train_cfg.max_epochs': 11},
        {'train_dataloader.batch_size': 49},
        {'model.backbone.depth': 14},
        {'data_preprocessor.mean': [5.0]},
        {'load_from': 'start.pth'},
        {'train_dataloader.dataset.dataset.split': 'test'},
        {'val_dataloader.dataset.split': 'train'},
        {'custom_hooks': [dict(type='EMAHook')]},
    ],
    ids=str,
)
def test_another_network_other_data_or_another_schedule_is_another_setup(changed):
    before = gain.setup(config('vanilla/digits_student'))
    assert gain.setup(config('vanilla/digits_student', **changed)) != before
    assert gain.setup(config('vanilla/digits_student'), processes=2) != before
    how = {
        'train_dataloader.num_workers': 2,
        'train_cfg.val_interval': 5,
        'work_dir': 'elsewhere',
        'randomness.seed': 3,
        'resume': True,
    }
    assert gain.setup(config('vanilla/digits_student', **how)) == before


def result(**changed):
    return gain.Result(
        **{**dict(setup='a', taught=True, seed=0, name='mIoU', last=60.0, best=70.0, best_at=2, length=3), **changed}
    )


def test_the_student_alone_is_found_in_folders_alongside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, changed in {
        'alone_0': dict(taught=False, last=50.0),
        'alone_1': dict(taught=False, last=53.0),
        'other': dict(taught=False, setup='b'),
        'kd': {},
        'top1': dict(taught=False, name='aAcc'),
        'wsl': {},
    }.items():
        result(**changed).save(tmp_path / name)
    (tmp_path / 'later').mkdir()
    (tmp_path / 'later' / gain.RECORD).write_text(json.dumps(dict(version=2)))
    (tmp_path / 'cut').mkdir()
    (tmp_path / 'cut' / gain.RECORD).write_text('{"setup": "a", ')
    assert list(gain.alone(result(), Path('wsl'))) == [tmp_path / 'alone_0', tmp_path / 'alone_1']
    assert gain.gained(result(), Path('wsl'), (80.0, ''), 300).splitlines() == [
        'mIoU on 300 validation images:',
        '  teacher          80.00',
        '  student          60.00  last epoch (3), the one to compare',
        '                   70.00  best epoch (2), chosen on these validation data',
        '  student alone    51.50  last epoch, mean of 2 runs, alone_0, alone_1',
        '  gain             +8.50  student - student alone',
    ]


def test_what_is_not_known_is_said_and_shares_have_three_digits(tmp_path):
    text = gain.gained(result(last=0.41, best=0.42), tmp_path / 'det', None, 5)
    assert '  teacher        unknown\n' in text and '  student          0.410  last' in text
    assert '  student alone  unknown  no run of it with these data and this schedule' in text and 'gain' not in text


def test_a_run_says_what_it_gained_and_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', [str(ROOT / 'tools/train.py')])
    Runner.from_cfg(scripted(tmp_path / 'alone', [40.0, 50.0])).train()
    runner = Runner.from_cfg(scripted(tmp_path / 'it', [70.0, 60.0], distillation(data_preprocessor=None)))
    runner.register_hook(CheckTeacherHook())
    monkeypatch.setattr(
        CheckTeacherHook,
        'before_train',
        lambda hook, _: setattr(hook, 'found', (Figure('mIoU', 80.0, 100, None), 'validation images')),
    )
    runner.train()
    said = next((tmp_path / 'it').glob('*/*.log')).read_text()
    assert said[said.index('mIoU on 1,197') :].startswith(
        'mIoU on 1,197 validation images:\n'
        '  teacher          80.00  of 100 validation images\n'
        '  student          60.00  last epoch (2), the one to compare\n'
        '                   70.00  best epoch (1), chosen on these validation data\n'
        '  student alone    50.00  last epoch, alone\n'
        '  gain            +10.00  student - student alone\n'
        'Files:\n'
        '  it/epoch_2.pth\n'
        '  it/best_mIoU_epoch_1.pth\n'
    ), said[-2000:]
    assert f'python {ROOT}/tools/test.py it/' in said and ' it/epoch_2.pth\n' in said
    assert f'python {ROOT}/tools/model_converters/convert_kd_ckpt_to_student.py it/epoch_2.pth' in said
