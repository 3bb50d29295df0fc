"""Describe the machine that a benchmark runs on."""

import platform
from pathlib import Path

import torch

import mmwsl


def describe(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == 'cuda' else _cpu()
    return {
        'device': name,
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'mmwsl': mmwsl.__version__,
        'python': platform.python_version(),
    }


def caption(machine: dict) -> str:
    return f'{machine["device"]}, {machine["threads"]} threads, torch {machine["torch"]}, mmwsl {machine["mmwsl"]}'


def _cpu() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
