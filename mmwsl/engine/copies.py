"""Run a tool in a copy of a process that has imported everything already.

A tool takes some four seconds to import torch, mmengine and mmpretrain, longer than a short run trains. A command that
starts many runs has a server import them once. Each run is a fork of that server: a process of its own, with its own
output and environment. multiprocessing's ``forkserver`` would import the command's script in each of them, too, and
close their standard input.
"""

from __future__ import annotations

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
_SERVE = 'import sys; sys.path.append(sys.argv[2]); from mmwsl.engine.copies import serve; serve(int(sys.argv[1]))'
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

    It cannot where there is a GPU, since mmengine asks CUDA for its devices when it is imported, and CUDA does not work
    in copies of a process that has done so. Nor do Apple's libraries work in copies.
    """
    return sys.platform == 'linux' and not torch.cuda.is_available()


def run(tool: Path, arguments: Sequence[str], environment: Mapping[str, str], output: int, held: int) -> int | None:
    """Run a tool to its end.

    Args:
        tool: A script of Python.
        arguments: What follows it on a command line.
        environment: All of its environment. What imports read of it is that of the first run.
        output: Descriptor of the file that it prints to.
        held: Descriptor of a file that stays open, with its lock, until the tool ends, even if this process does not.

    Returns:
        The exit status, negative for a signal as in ``subprocess``; None if the tool did not start.
    """
    request = dict(tool=str(tool), arguments=list(arguments), environment=dict(environment), folder=os.getcwd())
    here, there = socket.socketpair()
    with here:
        try:
            with there:
                socket.send_fds(_running().requests, [b'.'], [there.fileno(), output, held])
            here.sendall(json.dumps(request).encode())
            here.shutdown(socket.SHUT_WR)
            answers = _all_of(here).splitlines()
        except OSError:  # the server cannot import what it should, or was killed
            return None
    if not answers:
        return None
    _seconds['server'] = float(answers[0])
    status, seconds = answers[1].split() if len(answers) > 1 else (-signal.SIGKILL, 0)
    with _changing:
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


def _running() -> _Server:
    """Return this process's server, and start it if there is none."""
    global _server
    with _changing:
        if _server is None or _server.user != os.getpid():
            _server = _Server()
        return _server


def _all_of(connection: socket.socket) -> bytes:
    with connection.makefile('rb') as stream:
        return stream.read()


def serve(descriptor: int) -> None:
    """Import what runs need, and fork for each request from a socket until its other end is closed."""
    for module in _IMPORTED:
        import_module(module)
    gc.freeze()  # runs need not look for garbage in what is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the runs decide
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the watchers
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
        for number in (held, output, connection):  # the last one tells the other end that the lock is no longer held
            os.close(number)


def _watch(connection: socket.socket, output: int, held: int, spent: float) -> None:
    """Fork into a tool; answer the server's processor time, and after its end the tool's status and processor time."""
    request = json.loads(_all_of(connection))
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
    connection.sendall(f'{spent}\n'.encode())
    _, status, used = os.wait4(tool, 0)
    connection.sendall(f'{os.waitstatus_to_exitcode(status)} {used.ru_utime + used.ru_stime}\n'.encode())
    os._exit(0)


def _become(tool: str, arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Do what ``python tool arguments`` does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get('OMP_NUM_THREADS', os.cpu_count() or 1)))
    # copies would draw the same numbers, and the same seed if a run has none
    random.seed()
    np.random.seed()
    torch.seed()
    sys.argv = [tool, *arguments]
    sys.path[0] = str(Path(tool).resolve().parent)
    runpy.run_path(tool, run_name='__main__')
