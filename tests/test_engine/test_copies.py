"""A tool in a copy of a process does what it does in a fresh one."""

import fcntl
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmwsl.engine import copies, runs
from mmwsl.utils.files import lock
from tests.tiny import ROOT

pytestmark = pytest.mark.skipif(not copies.possible(), reason='needs Linux without a GPU')


@pytest.fixture
def run(tmp_path):
    """Run a script in a copy; return its status and what it printed."""

    def start(text, *arguments, **environment):
        script, output = tmp_path / 'tool.py', tmp_path / 'output.log'
        script.write_text(text)
        with (tmp_path / 'lock').open('w') as held, output.open('a') as stream:
            environment = {**os.environ, **environment}
            status = copies.run(script, arguments, environment, stream.fileno(), held.fileno())
        return status, output.read_text()

    return start


def test_a_tool_has_its_arguments_its_environment_and_its_folder(run, tmp_path, monkeypatch):
    (tmp_path / 'beside.py').write_text('here = 7')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('GONE', raising=False)
    text = (
        'import beside, os, sys, torch; print(sys.argv[1:], os.environ["NEW"], "GONE" in os.environ, beside.here, '
        'os.getcwd(), torch.get_num_threads(), __name__, "mmpretrain.models" in sys.modules)'
    )
    status, printed = run(text, 'a', '--b=1', NEW='x', OMP_NUM_THREADS='3')
    assert status == 0
    assert printed == f"['a', '--b=1'] x False 7 {Path.cwd()} 3 __main__ True\n"


@pytest.mark.parametrize(
    'text, status, said',
    [
        ('import sys; sys.exit(3)', 3, ''),
        ('raise ValueError("no such thing")', 1, 'ValueError: no such thing\n'),
        ('import sys; sys.exit("no such thing")', 1, 'no such thing\n'),
        (f'import os; os.kill(os.getpid(), {signal.SIGKILL})', -signal.SIGKILL, ''),
    ],
)
def test_status_and_error_are_those_of_the_tool(run, text, status, said):
    ended, printed = run(text)
    assert ended == status
    assert printed.endswith(said)


def test_processor_time_of_a_tool_is_counted(run):
    before = copies.processor_time()
    run('import time; begin = time.process_time()\nwhile time.process_time() < begin + 0.2: pass')
    assert copies.processor_time() - before > 0.2


def test_output_is_appended(run):
    run('print(1)')
    assert run('import sys; print(2); print(3, file=sys.stderr, flush=True)')[1].split()[0] == '1'


def test_copies_draw_different_numbers(run):
    text = 'import random, numpy, torch; print(random.random(), numpy.random.rand(), torch.rand(1, dtype=float).item())'
    run(text)
    first, second = run(text)[1].splitlines()
    assert not set(first.split()) & set(second.split())


def test_standard_input_is_that_of_the_command(run):
    """As for any child; pytest's own is empty."""
    assert run('import os; print(os.fstat(0).st_ino)') == (0, f'{os.fstat(0).st_ino}\n')


def test_a_lock_is_free_once_the_tool_has_ended(run, tmp_path):
    for _ in range(20):
        run('')
        with (tmp_path / 'lock').open() as file:
            lock(file, 'held')


def test_a_script_without_guard_can_start_runs(tmp_path):
    """It is not imported again in its runs."""
    script, tool = tmp_path / 'mine.py', tmp_path / 'tool.py'
    tool.write_text('')
    script.write_text(
        f'from pathlib import Path; from mmwsl.engine import runs; print(runs.train(Path("{tool}"), Path("c.py"), '
        f'Path("{tmp_path}/work")))'
    )
    command = [sys.executable, '-W', 'ignore', script]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == 'True\n'


def test_signals_to_all_processes_are_answered_by_the_tool_alone(tmp_path):
    """Slurm's are; the current folder is not searched for what the server imports."""
    (tmp_path / 'mmpretrain.py').write_text('raise ImportError("of the current folder")')
    (tmp_path / 'tool.py').write_text(
        'import os, signal, sys; save = lambda *_: (print("saved", "mmpretrain" in sys.modules), sys.exit(7)); '
        'signal.signal(signal.SIGUSR1, save); os.killpg(0, signal.SIGUSR1); signal.pause()'
    )
    driver = (
        'import os, signal; from pathlib import Path; from mmwsl.engine import copies; '
        'signal.signal(signal.SIGUSR1, signal.SIG_IGN); held = open("lock", "w"); '
        'environment = {**os.environ, "OMP_NUM_THREADS": "1"}; '
        'print(copies.run(Path("tool.py"), [], environment, 1, held.fileno()), copies._running().process.poll())'
    )
    ended = subprocess.run(
        [sys.executable, '-P', '-W', 'ignore', '-c', driver],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        start_new_session=True,
    )
    assert ended.stdout == 'saved True\n7 None\n'


def test_ctrl_c_while_the_server_imports_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, '_SERVE', f'import signal; open("{tmp_path}/begun", "w"); signal.pause()')
    monkeypatch.setattr(copies, '_server', None)
    (tmp_path / 'tool.py').write_text('')
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(runs.train, tmp_path / 'tool.py', Path('config.py'), tmp_path / 'work')
        while not (tmp_path / 'begun').exists():
            os.sched_yield()
        copies._server.process.send_signal(signal.SIGINT)
        with pytest.raises(RuntimeError, match='failed with status -2'):
            run.result()
    assert copies._server is None


def test_a_tool_is_killed_if_its_command_is_interrupted(tmp_path):
    """As subprocess.run does."""
    (tmp_path / 'tool.py').write_text(
        f'import os, signal; os.kill({os.getpid()}, signal.SIGALRM); signal.pause(); open("{tmp_path}/went_on", "w")'
    )

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.train(tmp_path / 'tool.py', Path('config.py'), tmp_path / 'work')
    finally:
        signal.signal(signal.SIGALRM, before)
    with (tmp_path / 'work/lock').open('a') as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # free once it is gone
    assert not (tmp_path / 'went_on').exists()


def test_a_tool_starts_in_a_fresh_process_if_the_server_is_gone(tmp_path):
    script = tmp_path / 'tool.py'
    script.write_text('import sys; print("mmpretrain" in sys.modules)')
    assert runs.train(script, Path('config.py'), tmp_path / 'copied')
    server = copies._running()
    server.process.kill()
    server.process.wait()
    assert runs.train(script, Path('config.py'), tmp_path / 'fresh')
    copies._server = None
    said = {name: (tmp_path / name / 'output.log').read_text() for name in ('copied', 'fresh')}
    assert said == dict(copied='True\n', fresh='False\n')


def test_a_copy_may_have_workers(run):
    text = 'from torch.utils.data import DataLoader; print(list(DataLoader([5, 6], num_workers=1)))'
    assert run(text) == (0, '[tensor([5]), tensor([6])]\n')


def test_a_run_ends_with_the_weights_of_a_fresh_process(tmp_path, monkeypatch):
    import torch

    ends = []
    for copied in (True, False):
        monkeypatch.setattr(copies, 'possible', lambda copied=copied: copied)
        work_dir = tmp_path / str(copied)
        options = ['randomness.seed=0', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=2']
        assert runs.train(ROOT / 'tools/train.py', ROOT / 'configs/vanilla/digits_student.py', work_dir, options)
        ends.append(torch.load(work_dir / 'epoch_1.pth', weights_only=False)['state_dict'])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_with_a_gpu_a_process_is_fresh(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert not copies.possible()
    monkeypatch.undo()
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert not copies.possible()
