import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mmengine.config import Config

from mmwsl.engine import runs
from mmwsl.engine.comparison import METRICS, Trained, draw, metric_of, plan, report, table, train_all, training, warning
from mmwsl.utils.pictures import pyplot
from tests.tiny import ROOT

CONFIGS = ROOT / 'configs'


def options_of(planned):
    return {
        name: [(run.config.name, run.work_dir.name, *run.options) for run in arm] for name, arm in planned.arms.items()
    }


def test_a_single_distillation_is_compared_with_its_controls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan([CONFIGS / 'wsl_digits.py'], Path('out'), [0, 3], ['a=1'])
    taught = 'a=1', 'model.teacher_ckpt=out/teacher/epoch_10.pth'
    assert options_of(planned) == {
        'Student alone': [('alone.py', f'alone_seed{seed}', f'randomness.seed={seed}', 'a=1') for seed in (0, 3)],
        'Plain soft labels (KD)': [('kd.py', f'kd_seed{seed}', f'randomness.seed={seed}', *taught) for seed in (0, 3)],
        'Weighted soft labels (WSL)': [
            ('wsl_digits.py', f'wsl_digits_seed{seed}', f'randomness.seed={seed}', *taught) for seed in (0, 3)
        ],
    }
    wsl, alone, kd, teacher = (
        Config.fromfile(path)
        for path in (CONFIGS / 'wsl_digits.py', 'out/configs/alone.py', 'out/configs/kd.py', planned.teacher.config)
    )
    assert alone.model == wsl.model.architecture and teacher.model == wsl.model.teacher
    assert kd.model.distiller.distill_losses.loss_wsl == dict(
        type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25, weighting='one'
    )
    assert {**kd.model, 'distiller': None} == {**wsl.model, 'distiller': None}
    assert kd.train_dataloader == alone.train_dataloader == wsl.train_dataloader


def test_what_is_taught_reads_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = plan([CONFIGS / 'wsl_digits.py'], Path('out'), [0], cached=True)
    alone, _, wsl = (arm[0].options for arm in planned.arms.values())
    assert alone == ('randomness.seed=0',) and planned.teaching == ('model.teacher_ckpt=out/teacher/epoch_10.pth',)
    cfg = Config.fromfile(CONFIGS / 'wsl_digits.py')
    cfg.merge_from_dict(dict(option.split('=') for option in wsl))
    assert cfg.model.teacher_cache == cfg.train_dataloader.dataset.cache == 'out/teacher_cache'
    assert cfg.train_dataloader.dataset.type == 'mmwsl.CachedViews'
    assert cfg.train_dataloader.dataset.dataset.type == 'mmwsl.Digits'


def test_the_config_of_the_teacher_trains_it_and_is_no_arm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the configs' teacher_ckpt does not exist
    given = [
        CONFIGS / name
        for name in ('vanilla/digits_teacher.py', 'vanilla/digits_student.py', 'kd_digits.py', 'dkd_digits.py')
    ]
    planned = plan(given, tmp_path, [0])
    assert list(planned.arms) == ['Student alone', 'Plain soft labels (KD)', 'dkd_digits']
    assert planned.teacher == Trained(given[0], tmp_path / 'teacher', ('randomness.seed=0',))
    assert planned.teacher.last_checkpoint == tmp_path / 'teacher/epoch_30.pth'
    assert planned.teacher_ckpt is None


def test_a_teacher_of_the_students_network_is_known_by_its_file(tmp_path):
    (tmp_path / 'wsl.py').write_text(
        f"_base_ = ['{CONFIGS / 'wsl_digits.py'}']\n"
        "model = dict(teacher=_base_.model.architecture, teacher_ckpt='runs/teacher/epoch_1.pth')"
    )
    for name in ('teacher', 'student'):
        (tmp_path / f'{name}.py').write_text(
            f"_base_ = ['wsl.py']\nmodel = dict(_delete_=True, **_base_.model.architecture)\nwork_dir = 'runs/{name}'"
        )
    planned = plan([tmp_path], tmp_path / 'out', [0])
    assert planned.teacher.config == tmp_path / 'teacher.py'
    assert planned.arms['Student alone'][0].config == tmp_path / 'student.py'


def test_a_folder_stands_for_its_configs(tmp_path):
    for name, base in dict(wsl='wsl_digits', kd='kd_digits', student='vanilla/digits_student').items():
        (tmp_path / f'{name}.py').write_text(f"_base_ = ['{CONFIGS / base}.py']")
    planned = plan([tmp_path], tmp_path / 'out', [0])
    assert {name: arm[0].config.stem for name, arm in planned.arms.items()} == {
        'Student alone': 'student',
        'Plain soft labels (KD)': 'kd',
        'Weighted soft labels (WSL)': 'wsl',
    }


def test_a_teacher_that_is_there_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = Path('checkpoints/digits_teacher.pth')
    ckpt.parent.mkdir()
    ckpt.touch()
    planned = plan([CONFIGS / 'wsl_digits.py'], tmp_path / 'out', [0])
    assert planned.teacher_ckpt == str(ckpt)
    assert [arm[0].options for arm in planned.arms.values()] == 3 * [('randomness.seed=0',)]
    # a comparison's own is one of its runs, whose log has its score
    (tmp_path / 'own.py').write_text(
        f"_base_ = ['{CONFIGS / 'wsl_digits.py'}']\nmodel = dict(teacher_ckpt='{tmp_path}/out/teacher/epoch_10.pth')"
    )
    for name in ('epoch_10.pth', 'run.json'):
        path = tmp_path / 'out/teacher' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert plan([tmp_path / 'own.py'], tmp_path / 'out', [0]).teacher_ckpt is None


@pytest.mark.parametrize(
    'given, message',
    [
        (['nothing.py'], r'there is no config nothing\.py: give a config, or a folder'),
        (['vanilla/digits_student.py'], r'should be a distillation.*train a network alone: .*digits_student'),
        (['wsl_digits.py', 'wsl_digits_student_student.py'], 'should have one teacher.*student_student.py differ'),
    ],
)
def test_what_cannot_be_compared_is_explained(tmp_path, given, message, monkeypatch):
    monkeypatch.chdir(CONFIGS)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        plan([Path(name) for name in given], tmp_path, [0])


def log_of(scores):
    return [{'accuracy/top1': score, 'step': epoch} for epoch, score in enumerate(scores, 1)]


def test_runs_are_told_of_and_come_in_their_order(tmp_path, monkeypatch):
    logs, told = {'b': log_of(range(4))}, []  # b was interrupted after 4 of its 10 epochs

    def train(tool, config, work_dir, options, threads, version):
        trained = len(logs.get(work_dir.name, ())) < 10
        logs[work_dir.name] = log_of(range(10))
        return trained

    monkeypatch.setattr(runs, 'train', train)
    monkeypatch.setattr(runs, 'scalars', lambda work_dir: logs.get(work_dir.name, []))
    planned = [Trained(CONFIGS / 'wsl_digits.py', tmp_path / name, ()) for name in 'ab']
    assert train_all(Path(), planned, 1, 1, told.append) == 2 * [log_of(range(10))]
    assert [line.partition(',')[0] for line in told] == ['a is trained', 'b is trained']
    assert told[-1] == 'b is trained, 20 of 20 epochs'
    assert train_all(Path(), planned, 1, 1, told.append) and len(told) == 2  # there was nothing left to train


def test_no_run_begins_after_one_that_failed(tmp_path, monkeypatch):
    begun, cancelled = [], threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait)

    def train(tool, config, work_dir, *rest):
        begun.append(work_dir.name)
        if work_dir.name == '0':
            raise RuntimeError('no memory')
        cancelled.wait()

    monkeypatch.setattr(training, 'ThreadPoolExecutor', Pool)
    monkeypatch.setattr(runs, 'train', train)
    planned = [Trained(CONFIGS / 'wsl_digits.py', tmp_path / str(number), ()) for number in range(4)]
    with pytest.raises(RuntimeError, match='no memory'):
        train_all(Path(), planned, 1, 1, print)
    assert begun in (['0'], ['0', '1'])  # at most the one that began before this was seen


def test_time_left_is_that_of_the_epochs_since_the_command(tmp_path, monkeypatch):
    logs = {'a': log_of(range(4))}
    monkeypatch.setattr(runs, 'scalars', lambda work_dir: logs[work_dir.name])
    clock = iter([100.0, 160.0])
    monkeypatch.setattr(training.time, 'monotonic', lambda: next(clock))
    progress = training._Progress([Trained(CONFIGS / 'wsl_digits.py', tmp_path / 'a', ())])
    logs['a'] = log_of(range(7))  # 3 epochs in 60 s, and 3 are left
    assert progress.line() == '7 of 10 epochs, about 60 s left'


def test_picture_has_the_weights_of_arms_that_weight(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(report, '_draw_weights', lambda axis, weighted: drawn.append([*weighted]))

    def arm(*weights):
        return [log_of([50, 60]) + [{'distill.wsl_weight': w, 'epoch': i} for i, w in enumerate(weights, 1)]]

    logs = {'Student alone': arm(), 'kd': arm(1.0, 1.0), 'wsl': arm(1.0, 0.5)}
    draw(METRICS[0], 90.0, logs, tmp_path / 'a.png')
    draw(METRICS[0], 90.0, {'kd': logs['kd']}, tmp_path / 'b.png')
    assert drawn == [['wsl']] and (tmp_path / 'b.png').exists()


def test_several_arms_have_a_colour_and_a_name_each():
    axis = pyplot().figure().subplots()
    arm = [[{'distill.wsl_weight': 0.5, 'epoch': 1}]] * 2
    report._draw_weights(axis, {'wsl': arm, 'plain': arm})
    assert [(line.get_color(), line.get_label()[:6]) for line in axis.lines] == [
        ('C0', 'wsl'),
        ('C0', '_child'),  # not in the legend
        ('C1', 'plain'),
        ('C1', '_child'),
    ]


def test_epochs_without_validation_count(tmp_path, monkeypatch):
    log = [dict(loss=1.0, epoch=5, step=60), {'accuracy/top1': 50.0, 'step': 5}, {'accuracy/top1': 60.0, 'step': 10}]
    monkeypatch.setattr(runs, 'scalars', lambda work_dir: log)
    progress = training._Progress([Trained(CONFIGS / 'wsl_digits.py', tmp_path / 'a', ())])
    assert progress.line() == '10 of 10 epochs'


def test_table_has_the_last_epochs():
    arms = {'Student alone': [log_of([10, 50]), log_of([90, 53])], 'kd': [log_of([60.126])]}
    assert table(METRICS[0], 61.5, arms).splitlines()[1:] == [
        'Teacher                         61.50',
        'Student alone                   51.50 +-  2.12   50.00, 53.00',
        'kd                              60.13 +-     -   60.13',
    ]


def test_a_teacher_that_is_no_better_is_named():
    alone = {'Student alone': [log_of([10, 50]), log_of([90, 53])]}
    assert warning(METRICS[0], 51.6, alone) == warning(METRICS[0], 1.0, {'kd': [log_of([60.0])]}) == ''
    assert warning(METRICS[0], 51.5, alone).startswith(
        'The teacher (51.50) is no better than the student alone (51.50), so there is little to learn'
    )


def test_metric_is_what_was_logged():
    assert metric_of([dict(loss=1.0), {'coco/bbox_mAP': 0.5, 'step': 1}]).scores([{'coco/bbox_mAP': 0.5}]) == [50.0]
    with pytest.raises(ValueError, match=r"should log one of accuracy/top1, .*logged \['loss'\]"):
        metric_of([dict(loss=1.0)])


def test_a_config_that_was_changed_is_not_taken_for_the_one_that_ran(tmp_path):
    config, work_dir = tmp_path / 'c.py', tmp_path / 'work'
    work_dir.mkdir()
    (tmp_path / 'train.py').write_text('')
    config.write_text('lr = 0.1')
    assert runs.train(tmp_path / 'train.py', config, work_dir, version=runs.version_of(config))
    config.write_text('lr = 0.1  # good')
    assert not runs.train(tmp_path / 'train.py', config, work_dir, version=runs.version_of(config))
    config.write_text('lr = 0.2')
    with pytest.raises(ValueError, match=rf'c.py has changed since its run in {work_dir} began.*rm -r {work_dir}'):
        runs.train(tmp_path / 'train.py', config, work_dir, version=runs.version_of(config))
    assert json.loads((work_dir / 'run.json').read_text())['finished']
