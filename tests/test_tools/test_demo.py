"""tools/demo.py without its training: which runs it asks for, and what it makes of their logs."""
import re
import statistics

from mmengine.config import Config

from tests.tiny import ROOT, load_tool


def test_demo_shows_what_its_runs_logged(tmp_path, monkeypatch, capsys):
    demo, asked = load_tool('demo'), {}

    def train(tool, config, work_dir, options, threads):
        cfg = Config.fromfile(config)
        work_dir.mkdir(parents=True)
        asked[work_dir.name] = cfg, dict(option.split('=') for option in options)

    def scalars(work_dir):
        cfg, options = asked[work_dir.name]
        seed, weight = int(options['randomness.seed']), {'distill.wsl_weight': 0.5} if 'teacher' in cfg.model else {}
        return [line for epoch in range(1, cfg.train_cfg.max_epochs + 1)
                for line in (dict(loss=1.0, step=12 * epoch, **weight),
                             {'accuracy/top1': 50.0 + epoch + 3 * seed, 'step': epoch})]
    monkeypatch.setattr(demo, 'train_once', train)
    monkeypatch.setattr(demo, 'scalars', scalars)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['demo.py', '--seeds', '2'])
    demo.main()
    printed = capsys.readouterr().out
    assert re.search(r'^Teacher +80\.00$', printed, re.M)  # of its last epoch
    for arm in demo.ARMS:
        row = rf'^{re.escape(arm)} +61\.50 \+- +{statistics.stdev([60, 63]):.2f} +60\.00, 63\.00$'
        assert re.search(row, printed, re.M)
    assert (tmp_path / 'work_dirs/demo/demo.png').stat().st_size > 10_000
    assert len(asked) == 1 + 2 * 3
    last_of_teacher = f'work_dirs/demo/teacher/epoch_{asked["teacher"][0].train_cfg.max_epochs}.pth'
    for cfg, options in asked.values():
        assert options.get('model.teacher_ckpt') == (last_of_teacher if 'teacher' in cfg.model else None)
    assert {cfg.filename.removeprefix(f'{ROOT}/configs/') for cfg, _ in asked.values()} == {
        'vanilla/digits_teacher.py', 'vanilla/digits_student.py', 'kd_digits.py', 'wsl_digits.py'}
