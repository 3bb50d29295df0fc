"""tools/compare.py without its training: what it asks for, and what it shows."""

import json
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config

from mmwsl.engine import runs
from tests.tiny import ROOT, load_tool

CONFIG = ROOT / 'configs/wsl_digits.py'


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Run the tool in an empty folder on runs that end at once; return the work dirs that were trained."""
    tool, trained = load_tool('compare'), []

    def scalars(work_dir):
        weight = {'distill.wsl_weight': 0.5} if 'wsl' in work_dir.name else {}
        score = 50.0 + 10 * ('teacher' in work_dir.name) + int(work_dir.name[-1:] == '1')
        return [
            line
            for epoch in (1, 2)
            for line in (
                dict(loss=1.0, step=12 * epoch, epoch=epoch, **weight),
                {'accuracy/top1': score, 'step': epoch},
            )
        ]

    monkeypatch.setattr(runs, 'train', lambda tool, config, work_dir, *rest: trained.append(work_dir.name))
    monkeypatch.setattr(runs, 'scalars', lambda work_dir: scalars(work_dir) if work_dir.name in trained else [])
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr('sys.argv', [str(ROOT / 'tools/compare.py'), str(CONFIG), '--jobs', '1', *arguments])
        tool.main()
        return trained

    return run


def test_teacher_and_students_are_trained_and_shown(compare, capsys):
    assert compare('--seeds', '0', '1') == [
        'teacher',
        'alone_seed0',
        'alone_seed1',
        'kd_seed0',
        'kd_seed1',
        'wsl_digits_seed0',
        'wsl_digits_seed1',
    ]
    printed = capsys.readouterr().out
    assert 'Teacher                         60.00\n' in printed
    assert 'Weighted soft labels (WSL)      50.50 +-  0.71   50.00, 51.00\n' in printed
    assert 'no better' not in printed
    assert printed.endswith('convert_kd_ckpt_to_student.py work_dirs/wsl_digits/kd_seed1/epoch_10.pth\n')
    assert Path('work_dirs/wsl_digits/comparison.png').stat().st_size > 10_000


def test_a_teacher_that_is_there_is_tested_and_asked_for_its_views(compare, monkeypatch, capsys):
    asked = []

    def run(command, **kwargs):
        asked.append(command[3:])
        Path('out').mkdir(exist_ok=True)
        Path('out/teacher.json').write_text(json.dumps({'accuracy/top1': 49.0}))
        return subprocess.CompletedProcess(command, 0, '')

    monkeypatch.setattr(subprocess, 'run', run)
    Path('checkpoints').mkdir()
    Path('checkpoints/digits_teacher.pth').touch()
    trained = compare('--out', 'out', '--views', '3', '--cfg-options', 'val_dataloader.batch_size=2')
    assert trained == ['alone_seed0', 'kd_seed0', 'wsl_digits_seed0']
    options = ['--cfg-options', 'val_dataloader.batch_size=2']
    assert asked == [
        [str(ROOT / 'tools/cache_teacher.py'), str(CONFIG), '--views', '3', '--out', 'out/teacher_cache', *options],
        [
            str(ROOT / 'tools/test.py'),
            'out/configs/on_validation_data.py',
            '--teacher',
            '--out',
            'out/teacher.json',
            '--out-item',
            'metrics',
            '--work-dir',
            'out/teacher_test',
            *options,
            'test_dataloader.batch_size=2',
        ],
    ]
    cfg = Config.fromfile('out/configs/on_validation_data.py')
    assert cfg.test_dataloader == cfg.val_dataloader and cfg.test_evaluator == cfg.val_evaluator
    assert 'The teacher (49.00) is no better than the student alone (50.00)' in capsys.readouterr().out


@pytest.mark.parametrize(
    'said, shown',
    [
        ('Traceback\nValueError: it is not the file', 'ValueError: it is not the file'),
        (
            '1 of 9\nError: no such file.\nWhere it was raised is in a.log.',
            'Error: no such file.\nWhere it was .* a.log.',
        ),
        ('1 of 9\n2 of 9', '1 of 9\n2 of 9'),
    ],
)
def test_a_tool_that_fails_ends_with_its_error(compare, monkeypatch, said, shown):
    monkeypatch.setattr(
        subprocess,
        'run',
        lambda command, **kwargs: subprocess.CompletedProcess(command, 1, said),
    )
    with pytest.raises(RuntimeError, match=rf'^tools/cache_teacher.py failed: {shown}$'):
        compare('--views', '3')


def test_a_folder_that_no_setting_can_hold_is_refused(compare, capsys):
    with pytest.raises(SystemExit):
        compare('--out', 'my, runs')
    assert '--out must not contain spaces or commas' in capsys.readouterr().err
