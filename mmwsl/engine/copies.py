"""Run a tool in a copy of a process that has imported everything already.

A tool takes some four seconds to import torch, mmengine and mmpretrain, longer than a short run trains. A command that
starts many runs has a server import them once. For each run the server forks a watcher, which forks the tool, waits for
it and answers its exit status, so that the server can take the next request. A tool is a process of its own, with its
own output and environment. multiprocessing's ``forkserver`` would import the command's script in each of them, too, and
close their standard input.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

_ROOT = Path(__file__).resolve().parents[2]
_SERVE = (  # without '', the current folder
    'import sys; sys.path = [*filter(None, sys.path), sys.argv[2]]; '
    'from mmwsl.engine.copies import serve; serve(int(sys.argv[1]))'
)
_OF_RUNS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a run answers; Slurm and Ctrl-C send them to the server and the watchers, too."""
_IMPORTED = (
    'mmwsl.registry',  # readies the stack, so it comes first
    'mmengine.runner',
    'mmpretrain.evaluation',
    'mmpretrain.models',
    'mmpretrain.visualization',
    'mmwsl.engine',
    'mmwsl.models',
)
_changing = threading.Lock()
_seconds = dict(server=0.0, tools=0.0)
_server: _Server | None = None


def possible() -> bool:
    """Whether a copy can do what a fresh process can.

    It cannot if there is a GPU, since mmengine asks CUDA for its devices when it is imported, and CUDA does not work in
    copies of a process that has done so. Apple's libraries do not work in copies either.
    """
    return sys.platform == 'linux' and not torch.cuda.is_available()


def run(tool: Path, arguments: Sequence[str], environment: Mapping[str, str], output: int, held: int) -> int | None:
    """Run a tool to its end, or kill it if this function is interrupted.

    Args:
        tool: A script of Python.
        arguments: Its command-line arguments.
        environment: Its whole environment, with ``OMP_NUM_THREADS``. Imports saw that of this process at its first run.
        output: Descriptor of the file that it prints to.
        held: Descriptor of a file that stays open, with its lock, until the tool ends, even if this process does not.

    Returns:
        The exit status, negative for a signal as in ``subprocess``; None if the tool did not start.
    """
    here, there = socket.socketpair()
    with here, here.makefile('r') as answers:
        server = _running()
        try:
            with there:
                request = dict(tool=str(tool), arguments=[*arguments], environment={**environment}, folder=os.getcwd())
                socket.send_fds(server.requests, [b'.'], [there.fileno(), output, held])
            here.sendall(json.dumps(request).encode())
            here.shutdown(socket.SHUT_WR)
            started = answers.readline().split()
        except OSError:  # the current folder is gone, or the server is
            started = []
        if not started:
            return -signal.SIGINT if server.is_interrupted() else None
        try:
            ended = answers.readline().split()
        except BaseException:
            os.kill(int(started[1]), signal.SIGKILL)
            raise
        answers.read()  # until no other process holds the lock
    status, seconds = ended or (-signal.SIGKILL, 0)
    with _changing:
        _seconds['server'] = max(_seconds['server'], float(started[0]))
        _seconds['tools'] += float(seconds)
    return int(status)


def processor_time() -> float:
    """Return the seconds of processor time of all tools so far and of the server, which ``os.times`` does not count."""
    return sum(_seconds.values())


class _Server:
    """The process that imports, and the socket that it takes requests from."""

    def __init__(self) -> None:
        self.user = os.getpid()
        self.requests, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, '-c', _SERVE, str(theirs.fileno()), str(_ROOT)],
                pass_fds=[theirs.fileno()],
                # OpenBLAS would start threads, which a copy does not get
                env={**os.environ, 'OMP_NUM_THREADS': '1'},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        atexit.register(self.end)

    def is_interrupted(self) -> bool:
        """Whether Ctrl-C ended it while it imported; the next run then starts another one."""
        global _server
        try:
            interrupted = self.process.wait(1) == -signal.SIGINT
        except subprocess.TimeoutExpired:
            return False
        with _changing:
            if interrupted and _server is self:
                _server = None
        return interrupted

    def end(self) -> None:
        """End it; tools that run go on."""
        self.requests.close()
        if self.user == os.getpid():
            self.process.kill()
            self.process.wait()


def _running() -> _Server:
    """Return this process's server, and start it if there is none."""
    global _server
    with _changing:
        if _server is None or _server.user != os.getpid():
            _server = _Server()
        return _server


def serve(descriptor: int) -> None:
    """Import what runs need, and fork for each request from a socket until its other end is closed."""
    for module in _IMPORTED:
        import_module(module)
    gc.freeze()  # runs need not look for garbage in what is imported
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_RUNS)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers need not be waited for
    requests = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1, 3)
        if not message:
            return
        connection, output, held = descriptors
        spent = time.process_time()
        if os.fork() == 0:
            requests.close()
            _watch(socket.socket(fileno=connection), output, held, spent)
            return
        # in this order: at the end of the connection the other side takes the lock to be free
        for number in (held, output, connection):
            os.close(number)


def _watch(connection: socket.socket, output: int, held: int, spent: float) -> None:
    """Fork a tool. Answer the server's processor time and the tool's process, then its status and processor time."""
    with connection.makefile('rb') as stream:
        request = json.load(stream)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    tool = os.fork()
    if tool == 0:
        connection.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        _become(**request)
        return
    os.close(held)
    os.close(output)
    connection.sendall(f'{spent} {tool}\n'.encode())
    _, status, used = os.wait4(tool, 0)
    connection.sendall(f'{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n'.encode())
    os._exit(0)


def _become(tool: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Do what ``python tool arguments`` does."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_RUNS)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment['OMP_NUM_THREADS']))
    # copies would draw the same numbers, and the same seed if a run has none
    random.seed()
    np.random.seed()
    torch.seed()
    script = Path(tool).resolve()
    sys.argv[:] = [tool, *arguments]
    if not sys.flags.safe_path:
        sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name='__main__')
