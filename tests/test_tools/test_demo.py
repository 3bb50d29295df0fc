"""tools/demo.py without its training: which runs it asks for, and what it makes of their logs."""

import re
import statistics

import pytest
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from mmwsl.engine import runs
from mmwsl.engine.comparison import planning, training
from tests.tiny import ROOT, load_tool


def test_demo_shows_what_its_runs_logged(tmp_path, monkeypatch, capsys):
    demo, asked = load_tool('demo'), {}

    def train(tool, config, work_dir, options, threads, version):
        cfg = Config.fromfile(config)
        work_dir.mkdir(parents=True)
        asked[work_dir.name] = cfg, dict(option.split('=') for option in options)

    def scalars(work_dir):
        if work_dir.name not in asked:  # not begun
            return []
        cfg, options = asked[work_dir.name]
        seed, weight = int(options['randomness.seed']), {'distill.wsl_weight': 0.5} if 'teacher' in cfg.model else {}
        return [
            line
            for epoch in range(1, cfg.train_cfg.max_epochs + 1)
            for line in (
                dict(loss=1.0, step=12 * epoch, epoch=epoch, **weight),
                {'accuracy/top1': 50.0 + epoch + 3 * seed, 'step': epoch},
            )
        ]

    monkeypatch.setattr(runs, 'train', train)
    monkeypatch.setattr(runs, 'scalars', scalars)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['demo.py', '--seeds', '2'])
    demo.main()
    printed = capsys.readouterr().out
    assert re.search(r'^Teacher +80\.00$', printed, re.M)  # of its last epoch
    for arm in demo.TASKS['cls'].arms:
        row = rf'^{re.escape(arm)} +61\.50 \+- +{statistics.stdev([60, 63]):.2f} +60\.00, 63\.00$'
        assert re.search(row, printed, re.M)
    assert (tmp_path / 'work_dirs/demo/demo.png').stat().st_size > 10_000
    assert len(asked) == 1 + 2 * 3
    last_of_teacher = f'work_dirs/demo/teacher/epoch_{asked["teacher"][0].train_cfg.max_epochs}.pth'
    for cfg, options in asked.values():
        assert options.get('model.teacher_ckpt') == (last_of_teacher if 'teacher' in cfg.model else None)
    assert {cfg.filename.removeprefix(f'{ROOT}/configs/') for cfg, _ in asked.values()} == {
        'vanilla/digits_teacher.py',
        'vanilla/digits_student.py',
        'kd_digits.py',
        'wsl_digits.py',
    }


@pytest.mark.parametrize('name', ['seg', 'multi', 'det'])
def test_a_demo_of_scenes_reads_the_metric_of_its_task(tmp_path, monkeypatch, capsys, name):
    demo, asked = load_tool('demo'), {}
    monkeypatch.setattr(demo, 'find_spec', lambda package: package)
    monkeypatch.setattr(
        runs,
        'train',
        lambda tool, config, work_dir, options, threads, version: asked.update({work_dir.name: (config, options)}),
    )
    metric = demo.TASKS[name].metric
    monkeypatch.setattr(
        runs,
        'scalars',
        lambda work_dir: [
            {'distill.wsl_weight': 0.5, 'epoch': 5, 'step': 5},
            {metric.key: 61.5 / metric.factor, 'step': 5},
        ],
    )
    # configs of other packages need them
    monkeypatch.setattr(runs, 'version_of', lambda config: '')
    for module in (planning, training):
        monkeypatch.setattr(module, 'epochs_of', lambda config: 5)
    image = torch.zeros(4, 4)
    map_, labels = PixelData(data=torch.ones(1, 4, 4)), torch.tensor([7, 2])
    boxes = InstanceData(bboxes=torch.tensor([[0.0, 1, 2, 3], [1, 0, 3, 2]]), labels=labels)
    sure = InstanceData(scores=torch.tensor([0.9, 0.1]), **dict(boxes.items()))
    found = BaseDataElement(
        **{
            'seg': dict(gt_sem_seg=map_, pred_sem_seg=map_),
            'multi': dict(gt_label=labels, pred_label=labels),
            'det': dict(gt_instances=boxes, pred_instances=sure),
        }[name]
    )
    seen = []
    monkeypatch.setattr(demo, 'predicted', lambda *run: seen.append(run) or demo.SHOWN * [(image, found)])
    monkeypatch.setattr('sys.argv', ['demo.py', '--task', name, '--out', str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    assert re.search(r'^Student alone +61\.50 \+- +0\.00 +61\.50, 61\.50, 61\.50$', printed, re.M)
    assert len(asked) == 1 + 3 * len(demo.TASKS[name].arms)
    taught = {folder for folder, (_, options) in asked.items() if any('teacher_ckpt' in option for option in options)}
    assert taught == {folder for folder in asked if folder[:3] in ('kd_', 'wsl', 'cwd')}
    assert [(config, path.parent.name) for config, path in seen] == [
        (demo.TASKS[name].teacher, 'teacher'),
        *(
            (demo.TASKS[name].arms[demo.ALONE], f'{config.split("/")[1]}_seed0')
            for config in demo.TASKS[name].arms.values()
        ),
    ]
    assert (tmp_path / 'scenes.png').stat().st_size > 5_000


def test_a_task_that_lacks_its_package_says_which(monkeypatch, capsys):
    demo = load_tool('demo')
    monkeypatch.setattr(demo, 'find_spec', lambda package: None)
    monkeypatch.setattr('sys.argv', ['demo.py', '--task', 'seg'])
    with pytest.raises(SystemExit):
        demo.main()
    assert '--task seg needs mmseg: run make install DENSE=1, or install the extra dense' in capsys.readouterr().err
