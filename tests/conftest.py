import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # read once Triton is imported: its kernels run on CPU tensors

import mmwsl.registry  # noqa: F401  readies the stack before a test imports mmrazor

torch.set_num_threads(1)  # for fixtures of modules, too, which run before those of a test
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Small tensors gain nothing from threads, and results do not depend on the machine's cores."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    """Each test draws the same numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def plain_configs(monkeypatch):
    """Leave configs as yapf finds them: laying one out takes as long as 20 steps here, and each checkpoint has one."""
    monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True))


@pytest.fixture
def cifar100():
    """The folder with the real CIFAR-100."""
    folder = ROOT / 'data/cifar100'
    if not (folder / 'cifar-100-python/train').exists():
        pytest.skip(f'needs CIFAR-100 in {folder}')
    return folder


@pytest.fixture
def published_teacher():
    """Path of a published CIFAR-100 ResNet of chenyaofo/pytorch-cifar-models, by depth."""
    folder = os.environ.get('MMWSL_TEACHERS')
    if not folder:
        pytest.skip('needs MMWSL_TEACHERS: the folder with chenyaofo_cifar100_resnet56.pth and its like')
    return lambda depth: Path(folder) / f'chenyaofo_cifar100_resnet{depth}.pth'
