"""tools/gpu.py: what is on disk when parts finish, fail, hang or are cut off, and the whole of it in small."""

import contextlib
import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.tiny import ROOT, load_tool, tool

# writes its process id, says that it did, and waits to be ended
STUCK = """import os, pathlib, signal
signal.signal(signal.SIGTERM, {1})
pathlib.Path("{0}/pid").write_text(str(os.getpid()))
pathlib.Path("{0}/begun").write_text("begun")
signal.pause()"""


@pytest.fixture
def gpu(monkeypatch):
    module = load_tool('gpu')
    monkeypatch.setattr(module, 'TICK', 0.0)
    return module


@pytest.fixture
def session(gpu, tmp_path):
    return gpu.Session(tmp_path, 100.0, lambda: 100.0, dict(os.environ))


def stuck(gpu, folder, on_sigterm='signal.SIG_DFL', **kwargs):
    return gpu.Part('stuck', [sys.executable, '-c', STUCK.format(folder, on_sigterm)], 1.0, **kwargs)


def shell(gpu, name, command, **kwargs):
    return gpu.Part(name, ['sh', '-c', command], **{'worth': 1.0, **kwargs})


def parts(folder):
    return json.loads((folder / 'status.json').read_text())['parts']


def is_gone(folder):
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / 'pid').read_text()), 0)
    return True


@pytest.mark.parametrize('heeds', [True, False])
def test_the_part_at_the_limit_is_ended_and_what_was_found_stays(gpu, session, tmp_path, monkeypatch, heeds):
    on_sigterm = f'lambda *_: exit(pathlib.Path("{tmp_path}/tidied").touch())' if heeds else 'signal.SIG_IGN'
    monkeypatch.setattr(gpu, 'GRACE', 60.0 if heeds else 0.0)
    session.left = lambda: 0.0 if (tmp_path / 'begun').exists() else 60.0
    collected = []
    for part in (
        shell(gpu, 'first', f'echo whole > {tmp_path}/first.json'),
        stuck(gpu, tmp_path, on_sigterm, collect=lambda: collected.append((tmp_path / 'tidied').exists())),
        shell(gpu, 'third', f'touch {tmp_path}/third.json'),
    ):
        session.carry_out(part)
    assert (tmp_path / 'first.json').read_text() == 'whole\n' and is_gone(tmp_path)
    assert collected[-1] == heeds and not (tmp_path / 'third.json').exists()
    assert parts(tmp_path) == [
        dict(name='first', state='finished', seconds=0.0),
        dict(name='stuck', state='cut off', seconds=60.0),
        dict(name='third', state='skipped', why='no time was left'),
    ]


def test_a_part_takes_no_more_of_the_limit_than_it_is_worth(gpu, session, tmp_path):
    clock = iter([80.0, 65.0, 60.1, 60.0, 60.0])  # 0.2 of 100 seconds
    session.left = lambda: next(clock)
    session.carry_out(gpu.Part('stuck', [sys.executable, '-c', 'import signal; signal.pause()'], worth=0.2))
    assert parts(tmp_path) == [dict(name='stuck', state='cut off', seconds=20.0)]


def test_a_part_that_fails_does_not_stop_the_others(gpu, session, tmp_path):
    session.carry_out(shell(gpu, 'bad', 'echo reason; exit 3', log='bad.txt'))
    session.carry_out(shell(gpu, 'good', 'true', needs=(tmp_path, tmp_path / 'bad.txt')))
    session.carry_out(shell(gpu, 'lacking', 'true', needs=(tmp_path, tmp_path / 'data')))
    assert [part['state'] for part in parts(tmp_path)] == ['failed', 'finished', 'skipped']
    assert parts(tmp_path)[2]['why'] == f'there is no {tmp_path}/data'
    assert (tmp_path / 'bad.txt').read_text() == "==== bad: sh -c 'echo reason; exit 3'\nreason\n"


def test_results_are_collected_while_a_part_runs(gpu, session, tmp_path):
    os.mkfifo(tmp_path / 'pipe')

    def collect():
        if (tmp_path / 'result').exists():
            with contextlib.suppress(OSError):  # nobody reads yet, or any more
                os.close(os.open(tmp_path / 'pipe', os.O_WRONLY | os.O_NONBLOCK))

    polls = iter(range(100_000, 0, -1))  # the part is cut off in the end
    session.left = lambda: next(polls) / 1000
    session.carry_out(shell(gpu, 'run', f'touch {tmp_path}/result; cat {tmp_path}/pipe', collect=collect))
    assert parts(tmp_path)[0]['state'] == 'finished'


def test_status_says_which_part_is_running(gpu, session, tmp_path):
    session.carry_out(shell(gpu, 'reader', f'cp {tmp_path}/status.json {tmp_path}/seen.json'))
    assert json.loads((tmp_path / 'seen.json').read_text())['parts'] == [dict(name='reader', state='running')]


def test_a_session_that_is_ended_ends_its_part(gpu, tmp_path):
    code = f"""
import gpu, pathlib, sys
gpu.TICK = 0.01
say = lambda: print((pathlib.Path({str(tmp_path)!r}) / 'begun').exists(), flush=True)
gpu.parts_of = lambda args: [gpu.Part('stuck', {stuck(gpu, tmp_path).command!r}, 1.0, collect=say)]
sys.argv[1:] = ['--rehearse', '--out', {str(tmp_path)!r}, '--work', {str(tmp_path)!r}]
gpu.main()"""
    with subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT / 'tools', stdout=subprocess.PIPE, text=True
    ) as process:
        assert 'True\n' in iter(process.stdout.readline, '')
        process.terminate()
        process.communicate()
    assert process.returncode == 143 and is_gone(tmp_path)
    assert parts(tmp_path)[0]['state'] == 'cut off'


def test_what_runs_logged_is_one_file(gpu, tmp_path):
    for run, lines in (('wsl', '{"step": 1}\n{"step": 2}\n{"st'), ('kd', '{"step": 1}\n')):
        log = tmp_path / f'work/{run}/20261127_000000/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(lines)  # the last line of one is being written
    gpu.collect_runs(tmp_path / 'work', tmp_path)
    assert [json.loads(line) for line in (tmp_path / 'runs.jsonl').read_text().splitlines()] == [
        dict(run='kd', step=1),
        dict(run='wsl', step=1),
        dict(run='wsl', step=2),
    ]


def test_figures_of_steps_are_collected_alone(gpu, tmp_path):
    gpu.collect_steps(tmp_path / 'work', tmp_path)
    assert not (tmp_path / 'train_step.json').exists()
    (tmp_path / 'work/teacher_cache').mkdir(parents=True)
    (tmp_path / 'work/train_step.json').write_text('{}')
    gpu.collect_steps(tmp_path / 'work', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['train_step.json', 'work']


def test_wheels_are_installed_beside_the_python_that_runs(gpu, tmp_path, monkeypatch):
    (tmp_path / 'wheels').mkdir()
    with zipfile.ZipFile(tmp_path / 'wheels/onlyhere-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('onlyhere.py', 'ANSWER = 42')
        wheel.writestr('onlyhere-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: onlyhere\nVersion: 1.0\n')
        wheel.writestr('onlyhere-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr('onlyhere-1.0.dist-info/RECORD', '')
    monkeypatch.setattr(
        'sys.argv',
        [
            'gpu.py',
            '--rehearse',
            '--out',
            str(tmp_path),
            '--work',
            str(tmp_path / 'work'),
            '--wheels',
            str(tmp_path / 'wheels'),
        ],
    )
    args = gpu.parse_args()
    session = gpu.Session(tmp_path, 100.0, lambda: 100.0, gpu.environment_of(args))
    session.carry_out(gpu.parts_of(args)[0])
    session.carry_out(gpu.Part('import', [sys.executable, '-c', 'import onlyhere, mmwsl; print(onlyhere.ANSWER)'], 1.0))
    assert [part['state'] for part in parts(tmp_path)] == ['finished', 'finished']
    assert (tmp_path / 'log.txt').read_text().endswith('42\n')
    assert (tmp_path / 'work/site/onlyhere.py').exists()


def test_without_a_gpu_the_rehearsal_is_named(gpu, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, '', 'Traceback\nAssertionError: Torch not compiled with CUDA enabled\n')
    monkeypatch.setattr(gpu.subprocess, 'run', lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r'no GPU here \(AssertionError: Torch not compiled.*\)\. --rehearse'):
        gpu.card()


def parsed(gpu, monkeypatch, *given):
    monkeypatch.setattr('sys.argv', ['gpu.py', *given])
    return gpu.parse_args()


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (['tests'], [('tests', 0.4)]),
        (['step=50', 'loss'], [('loss', 0.4), ('teacher', 0.1), ('step', 0.25)]),
        (['runs'], [('teacher', 0.1), ('runs', 1.0)]),
    ],
)
def test_parts_are_chosen_with_what_they_need(gpu, monkeypatch, given, expected):
    args = parsed(gpu, monkeypatch, '--seconds', '200', '--parts', *given)
    assert [(part.name, part.worth) for part in gpu.parts_of(args)] == expected


def test_runs_have_all_epochs_of_the_recipe_if_asked(gpu, monkeypatch, tmp_path):
    commands = [
        gpu.sweep(parsed(gpu, monkeypatch, '--work', str(tmp_path), *given)).command
        for given in ([], ['--epochs', '240'])
    ]
    assert {'train_cfg.max_epochs=40', 'param_scheduler.milestones=[25,30,35]'} <= set(commands[0])
    assert {'train_cfg.max_epochs=240', 'param_scheduler.milestones=[150,180,210]'} <= set(commands[1])


def test_a_part_that_is_none_is_named(gpu, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(gpu, monkeypatch, '--parts', 'los')
    assert "'los' is none of tests, loss, step, runs" in capsys.readouterr().err


def test_every_test_for_a_gpu_is_among_those_that_run(gpu, monkeypatch):
    files = {argument for argument in gpu.cuda_tests(parsed(gpu, monkeypatch)).command if argument.endswith('.py')}
    for name in (
        'test_engine/test_together',
        'test_models/test_losses/test_kernel',
        'test_models/test_losses/test_wsl_loss',
        'test_models/test_algorithms/test_one_graph',
    ):
        assert f'tests/{name}.py' in files


def test_tests_that_are_cut_off_tell_of_failures(gpu, session, tmp_path, monkeypatch):
    (tmp_path / 'test_two.py').write_text(f"""
import pathlib, signal
def test_fails(): assert 6 * 7 == 41
def test_hangs(): pathlib.Path({str(tmp_path)!r}, 'begun').touch(), signal.pause()""")
    monkeypatch.setattr(gpu, 'GRACE', 60.0)
    session.left = lambda: 0.0 if (tmp_path / 'begun').exists() else 60.0
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-rf', f'--rootdir={tmp_path}', str(tmp_path)]
    session.carry_out(gpu.Part('tests', command, 1.0, log='tests.txt', interrupted=True))
    log = (tmp_path / 'tests.txt').read_text()
    assert 'assert (6 * 7) == 41' in log and '1 failed' in log and parts(tmp_path)[0]['state'] == 'cut off'


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (
            ['REHEARSE=1', 'SECONDS=60'],
            '.venv/bin/python tools/gpu.py --seconds 60 --data data/cifar100 '
            '--teachers checkpoints --out work_dirs/gpu/results --rehearse',
        ),
        (
            ['WHEELS=w', 'DATA=d', 'TEACHERS=t', 'OUT=o', 'PYTHON=python3.12', 'PARTS=tests loss=80', 'EPOCHS=240'],
            'python3.12 tools/gpu.py --seconds 540 --data d --teachers t --out o '
            '--parts tests loss=80 --epochs 240 --wheels w',
        ),
    ],
)
def test_make_hands_its_folders_over(given, expected):
    done = subprocess.run(
        ['make', '--dry-run', '--old-file=.venv/.installed', 'gpu', *given],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={'PATH': os.environ['PATH']},
    )
    assert ' '.join(done.stdout.replace('\\\n', ' ').split()) == expected


def rehearse(tmp_path, data, teachers):
    out = tmp_path / 'out'
    tool(
        'gpu.py',
        '--rehearse',
        '--seconds',
        600,
        '--out',
        out,
        '--work',
        tmp_path / 'work',
        '--data',
        data,
        '--teachers',
        teachers,
        cwd=ROOT,
    )
    assert len(list(out.iterdir())) <= 8
    return {part['name']: part['state'] for part in parts(out)}, [
        json.loads(line) for line in (out / 'runs.jsonl').read_text().splitlines()
    ]


@pytest.mark.slow
def test_rehearsal_with_digits(tmp_path):
    states, lines = rehearse(tmp_path, tmp_path, tmp_path)
    assert states == dict(tests='finished', loss='finished', teacher='skipped', step='skipped', runs='finished')
    assert {line['run'] for line in lines if 'accuracy/top1' in line} == {'digits_student-max_epochs=1-seed=0'}
    assert 'skipped' in (tmp_path / 'out/tests.txt').read_text()
    rows = json.loads((tmp_path / 'out/loss.json').read_text())['rows']
    assert [row['dtype'] for row in rows] == ['float32', 'bfloat16']


@pytest.mark.slow
def test_rehearsal_with_cifar100_and_its_teacher(tmp_path, cifar100, published_teacher):
    states, lines = rehearse(tmp_path, cifar100, published_teacher(56).parent)
    assert states == dict.fromkeys(('tests', 'loss', 'teacher', 'step', 'runs'), 'finished')
    arms = ('r20', 'kd-hinton_r56_r20', 'kd_r56_r20', 'wsl_r56_r20')
    assert {line['run'] for line in lines if 'accuracy/top1' in line} == {
        f'{arm}_cifar100-max_epochs=1-seed=0' for arm in arms
    }
