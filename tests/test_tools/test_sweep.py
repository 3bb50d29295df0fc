import fcntl
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmwsl.engine import runs
from mmwsl.engine.comparison import METRICS, metric_of
from mmwsl.engine.kept_runs import KeptRuns
from tests.tiny import ROOT, load_tool, tool

sweep = load_tool('sweep')
TOP1 = METRICS[0]


@pytest.fixture(autouse=True)
def _logs_stay_open(monkeypatch):
    """Submitit and Alembic configure logging, which closes the log files of all tests before."""
    monkeypatch.setattr('logging.shutdown', lambda *handlers: None)


def test_plan_is_every_combination_the_seed_changing_last():
    planned = sweep.plan([Path('a.py'), Path('b.py')], ['model.x.tau=1,4'], [0, 7])
    assert [run.name for run in planned] == [
        'a-tau=1-seed=0',
        'a-tau=4-seed=0',
        'b-tau=1-seed=0',
        'b-tau=4-seed=0',
        'a-tau=1-seed=7',
        'a-tau=4-seed=7',
        'b-tau=1-seed=7',
        'b-tau=4-seed=7',
    ]
    assert planned[1].options == ['model.x.tau=4', 'randomness.seed=0']


def test_commas_in_brackets_belong_to_a_value():
    planned = sweep.plan([Path('c.py')], ['a.steps=[1,2],[3,(4,5)],6'], [0])
    assert [run.settings for run in planned] == [
        (('a.steps', '[1,2]'),),
        (('a.steps', '[3,(4,5)]'),),
        (('a.steps', '6'),),
    ]


@pytest.mark.parametrize(
    'setting, message',
    [
        ('tau', "takes KEY=VALUE1,VALUE2 .*, got 'tau'"),
        ('tau=', "got 'tau='"),
        ('name=a b', "without spaces.*got 'name=a b'"),
        ('a.tau=1,1', r"same name: \['c-tau=1-seed=0'\]"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(ValueError, match=message):
        sweep.plan([Path('c.py')], [setting], [0])


def log(work_dir, attempt, lines):
    path = work_dir / attempt / 'vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_epoch_that_was_repeated_after_a_kill_counts_once(tmp_path):
    first = [dict(loss=3.0, epoch=1, step=12), {'accuracy/top1': 50.0, 'step': 1}, dict(loss=2.0, epoch=2, step=24)]
    second = [dict(loss=2.5, epoch=2, step=24), {'accuracy/top1': 60.0, 'step': 2}]
    log(tmp_path, '20260101_000000', first)
    log(tmp_path, '20260101_000100', second)
    assert runs.scalars(tmp_path) == first[:2] + second


def test_a_validation_that_was_repeated_counts_once(tmp_path):
    first = [dict(loss=3.0, epoch=1, step=12), {'accuracy/top1': 50.0, 'step': 1}]
    second = [{'accuracy/top1': 50.5, 'step': 1}, dict(loss=2.5, epoch=2, step=24), {'accuracy/top1': 60.0, 'step': 2}]
    log(tmp_path, '20260101_000000', first)
    log(tmp_path, '20260101_000100', second)
    assert runs.scalars(tmp_path) == first[:1] + second


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path):
    log(tmp_path, '20260101_000000', [dict(loss=3.0, epoch=1, step=12)])
    (path,) = tmp_path.glob('*/vis_data/scalars.json')
    path.write_text(path.read_text() + '{"loss": 2.')
    assert runs.scalars(tmp_path) == [dict(loss=3.0, epoch=1, step=12)]
    path.write_text('{"loss": 2.\n' + path.read_text())
    with pytest.raises(ValueError, match='scalars.json is damaged'):
        runs.scalars(tmp_path)
    path.write_text('')
    assert runs.scalars(tmp_path) == []


def result_of(tmp_path, **fields):
    run = dict(name='c-seed=0', seed=0, options=[], started='20260101_000000', last=50.0, seconds=1, **fields)
    KeptRuns(tmp_path / 'results').keep(run, [], '')
    return tmp_path / 'results'


def test_the_result_of_another_command_is_not_replaced(tmp_path):
    planned = sweep.plan([Path('c.py')], [], [0, 1])
    args = SimpleNamespace(results=result_of(tmp_path), cfg_options=[])
    sweep.check_results(planned, args)
    args.cfg_options = ['train_cfg.max_epochs=1']
    with pytest.raises(
        ValueError,
        match=r'results keeps the result of c-seed=0 with the options \[\], not '
        r"\['train_cfg.max_epochs=1'\]: choose another --results, or delete its line",
    ):
        sweep.check_results(planned, args)


@pytest.mark.parametrize('begun, anew', [('20260101_000000', False), ('20260202_000000', True)])
def test_a_run_that_is_not_the_kept_one_is_kept(tmp_path, monkeypatch, begun, anew):
    """As where a driver was killed between the end of a training and its record."""
    kept = result_of(tmp_path)
    log(tmp_path / 'c-seed=0', begun, [dict(loss=3.0, epoch=1, step=12)])
    monkeypatch.setattr(runs, 'train', lambda *args, **kwargs: False)
    seen = []
    monkeypatch.setattr(sweep, 'keep', lambda *args: seen.append(args))
    args = SimpleNamespace(work_dir=tmp_path, results=kept, cfg_options=[], threads=1)
    sweep.carry_out(sweep.plan([Path('c.py')], [], [0])[0], args)
    assert bool(seen) is anew


@pytest.mark.parametrize(
    'arguments, threads', [([], 6), (['--jobs', '2'], 3), (['--jobs', '9'], 1), (['--jobs', '2', '--threads', '5'], 5)]
)
def test_cores_are_shared_out_to_the_jobs(monkeypatch, arguments, threads):
    monkeypatch.setattr(sweep.os, 'cpu_count', lambda: 6)
    monkeypatch.setattr(sys, 'argv', ['sweep.py', 'c.py', *arguments])
    assert sweep.parse_args().threads == threads


def test_an_epoch_without_its_validation_has_no_figure():
    log = [dict(loss=2.0, epoch=1, step=9), {'accuracy/top1': 50.123456, 'step': 2}, {'accuracy/top1': 60.0, 'step': 3}]
    assert sweep.of_each_epoch(log, TOP1, 3) == [None, 50.1235, 60.0]


def test_a_fraction_is_kept_in_per_cent():
    log = [{'coco/bbox_mAP': 0.25, 'step': 1}, {'coco/bbox_mAP': 0.5, 'step': 2}]
    assert sweep.of_each_epoch(log, metric_of(log), 2) == [25.0, 50.0]


def test_figure_of_an_earlier_epoch_is_not_kept_as_the_last(tmp_path):
    log = [{'accuracy/top1': 50.0, 'step': 1}, dict(loss=2.0, epoch=2, step=24)]
    sweep.check_last_epoch(log, TOP1, tmp_path, 1)
    with pytest.raises(RuntimeError, match='is of epoch 1, not 2.*Delete run.json'):
        sweep.check_last_epoch(log, TOP1, tmp_path, 2)


def test_one_process_trains_in_a_work_dir(tmp_path):
    with (tmp_path / 'lock').open('a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=f'another process trains in {tmp_path}.*wait for it or end it'):
            runs.train(Path('train.py'), Path('config.py'), tmp_path)


def test_a_run_goes_on_until_it_is_finished_and_is_then_not_repeated(tmp_path):
    script, work_dir = tmp_path / 'train.py', tmp_path / 'work'
    script.write_text('import os, sys; print(*sys.argv[1:], os.environ["OMP_NUM_THREADS"])')
    run = script, Path('config.py'), work_dir, ['a=1', 'b=2'], 3
    assert runs.train(*run)
    assert not runs.train(*run)
    told = (work_dir / 'output.log').read_text()
    assert told == f'config.py --work-dir {work_dir} --resume --cfg-options a=1 b=2 3\n'
    with pytest.raises(ValueError, match=r"holds a run with options \['a=1', 'b=2'\], not \['a=1'\]"):
        runs.train(script, Path('config.py'), work_dir, ['a=1'])
    with pytest.raises(ValueError, match='holds a run with config config.py, not other.py'):
        runs.train(script, Path('other.py'), work_dir, ['a=1', 'b=2'])


@pytest.mark.parametrize('copied', [True, False])
def test_a_process_that_outlives_its_driver_keeps_the_work_dir(tmp_path, copied):
    script, work_dir = tmp_path / 'train.py', tmp_path / 'work'
    script.write_text(
        'import os, socket; os.kill(int(os.environ["DRIVER"]), 9); there = socket.socket(socket.AF_UNIX); '
        f'there.connect("{tmp_path}/socket"); there.send(b"killed"); there.recv(1)'
    )
    driver = (
        'import os, sys; from pathlib import Path; from mmwsl.engine import copies, runs; '
        f'copies.possible = lambda: {copied}; os.environ["DRIVER"] = str(os.getpid()); '
        'runs.train(Path(sys.argv[1]), Path("config.py"), Path(sys.argv[2]))'
    )
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f'{tmp_path}/socket')
        server.listen()
        with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', driver, script, work_dir]) as process:
            here, _ = server.accept()
            with here:
                assert here.recv(6) == b'killed'
                assert process.wait() == -9  # and what it held is free
                script.write_text('')
                with pytest.raises(RuntimeError, match='another process trains'):
                    runs.train(script, Path('config.py'), work_dir)


@pytest.mark.slow
def test_sweep_keeps_every_run_and_repeats_none(tmp_path):
    config = ROOT / 'configs/vanilla/digits_student.py'
    command = [
        'sweep.py',
        config,
        '--seeds',
        0,
        1,
        '--set',
        'optim_wrapper.optimizer.lr=0.1',
        '--threads',
        1,
        '--work-dir',
        tmp_path / 'work',
        '--results',
        tmp_path / 'results',
        '--cfg-options',
    ]
    output = tool(*command, 'train_cfg.max_epochs=1').stdout
    assert '2/2 digits_student-lr=0.1-seed=1: top1' in output
    kept = {path: path.read_text() for path in (tmp_path / 'results').rglob('*') if path.is_file()}
    result = KeptRuns(tmp_path / 'results').find('digits_student-lr=0.1-seed=1')
    assert (result['config'], result['seed'], result['settings']) == (
        'digits_student',
        1,
        {'optim_wrapper.optimizer.lr': '0.1'},
    )
    assert result['last'] == result['of_each_epoch'][0] > 0
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.pth')}
    tool(*command[:2], '--jobs', 2, *command[2:], 'train_cfg.max_epochs=1')
    assert {path: path.read_text() for path in kept} == kept
    assert checkpoints == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.pth')}
    assert 'choose another --results' in tool(*command, 'train_cfg.max_epochs=2', check=False).stdout


def test_runs_that_train_together_are_kept_as_others_are(tmp_path):
    config = ROOT / 'configs/vanilla/digits_student.py'
    command = [
        'sweep.py',
        config,
        '--seeds',
        0,
        1,
        '--together',
        '--work-dir',
        tmp_path / 'work',
        '--results',
        tmp_path / 'results',
        '--cfg-options',
        'train_cfg.max_epochs=1',
    ]
    assert '2/2 digits_student-seed=1: top1' in tool(*command).stdout
    kept = {path: path.read_text() for path in (tmp_path / 'results').rglob('*') if path.is_file()}
    result = KeptRuns(tmp_path / 'results').find('digits_student-seed=1')
    assert result['seed'] == 1 and result['machine']['jobs'] == 2
    assert result['last'] == result['of_each_epoch'][0] > 0
    assert 'epoch 1/1' not in tool(*command).stdout
    assert {path: path.read_text() for path in kept} == kept


def test_failure_shows_what_the_run_said(tmp_path):
    with pytest.raises(RuntimeError, match=r'no_such_config.*status 1(?s:.*)there is no config'):
        runs.train(ROOT / 'tools/train.py', Path('no_such_config.py'), tmp_path)
    assert json.loads((tmp_path / 'run.json').read_text())['finished'] is False


@pytest.fixture
def on_slurm(tmp_path, monkeypatch):
    """Two runs and what a sweep knows of them; a run is carried out by its name alone."""
    pytest.importorskip('submitit')
    monkeypatch.setattr(sweep, 'carry_out', lambda run, args, fresh: dict(name=run.name, threads=args.threads))
    return sweep.plan([Path('a.py')], [], [0, 1]), SimpleNamespace(
        work_dir=tmp_path, slurm='gpus', threads=3, slurm_options=['timeout_min=5', 'slurm_qos=low']
    )


def test_runs_are_handed_to_slurm_in_their_order(on_slurm, monkeypatch):
    import submitit

    asked = {}
    monkeypatch.setattr(submitit.AutoExecutor, 'update_parameters', lambda self, **kwargs: asked.update(kwargs))
    results = list(sweep.carry_out_on_slurm(*on_slurm, cluster='debug'))
    assert results == [dict(name='a-seed=0', threads=3), dict(name='a-seed=1', threads=3)]
    assert asked == dict(name='sweep', cpus_per_task=3, slurm_partition='gpus', timeout_min=5, slurm_qos='low')


def test_a_job_that_is_queued_again_carries_out_the_same_run(on_slurm):
    (run, _), args = on_slurm
    with subprocess.Popen([sys.executable, '-c', '']) as training:
        again = sweep.OnSlurm().checkpoint(run, args)  # when the training has ended, which it leaves to others to see
        assert training.wait() == 0
    assert again.function(*again.args, **again.kwargs) == dict(name='a-seed=0', threads=3)


def test_without_submitit_the_extra_is_named(on_slurm, monkeypatch):
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(ImportError, match=r'Install mmwsl\[slurm\]'):
        sweep.carry_out_on_slurm(*on_slurm)


def test_search_of_the_page_finds_the_better_settings(tmp_path, monkeypatch):
    """As docs/scale.md has it, with runs that end at once and are best at tau 3."""
    pytest.importorskip('optuna')
    blocks = (ROOT / 'docs/scale.md').read_text().split('```python\n')
    block = next(block for block in blocks if 'import optuna' in block)

    def train(script, config, work_dir, options):
        tau = float(options[0].partition('tau=')[2])
        log(work_dir, '20260101_000000', [{'accuracy/top1': 90 - abs(tau - 3), 'step': 1}])

    monkeypatch.setattr(runs, 'train', train)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work_dirs').mkdir()
    found = {}
    exec(block.partition('```')[0], found)
    assert len(found['study'].trials) == 20 and abs(found['study'].best_params['tau'] - 3) < 1
    assert found['study'].best_value == pytest.approx(90 - abs(found['study'].best_params['tau'] - 3))
