"""Small networks, data and runs for the tests."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample

ROOT = Path(__file__).resolve().parent.parent
PREPROCESSOR = dict(type='mmpretrain.ClsDataPreprocessor', mean=[4.9], std=[6.0], num_classes=10)


def network(channels=4, classes=10, depth=8, **kwargs):
    """A classifier for images of one channel."""
    return dict(
        type='ImageClassifier',
        _scope_='mmpretrain',
        backbone=dict(
            type='mmwsl.CIFARResNet', depth=depth, in_channels=1, stem_channels=channels, base_channels=channels
        ),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=classes, in_channels=4 * channels),
        **kwargs,
    )


def distillation(**kwargs):
    """A WSLDistill over two of them, with an untrained teacher."""
    return {
        **dict(
            type='mmwsl.WSLDistill',
            architecture=network(2),
            teacher=network(4),
            data_preprocessor=PREPROCESSOR,
            distiller=dict(type='mmwsl.WSLDistiller'),
        ),
        **kwargs,
    }


def build(cfg):
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def batch(size=6, seed=0, channels=1, classes=10):
    """What a dataloader hands to ``train_step``: uint8 images and their labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 17, (size, channels, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (size,), generator=generator)
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in labels])


def losses(model, data):
    return model(**model.data_preprocessor(data, True), mode='loss')


def save_teacher(path, cfg=None, seed=1):
    """A teacher's checkpoint, with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    torch.save(dict(state_dict=build(cfg or network(4)).state_dict()), path)
    return str(path)


def digits_config(work_dir, model, epochs=1, checkpoint=None, **kwargs):
    """A short run on the digits."""
    cfg = Config.fromfile(ROOT / 'configs/vanilla/digits_student.py')
    cfg.merge_from_dict(
        dict(
            # mmengine keeps loggers by name and second: runs within one second would share a log
            work_dir=str(work_dir),
            experiment_name=str(work_dir).replace('/', '_'),
            train_cfg=dict(max_epochs=epochs),
            randomness=dict(seed=0),
            train_dataloader=dict(batch_size=100),
            default_hooks=dict(logger=dict(interval=1), checkpoint=checkpoint or {}),
        )
    )
    cfg.merge_from_dict(kwargs)
    cfg.model = model
    return cfg


def on_device(**kwargs):
    """What swapping the base with the datasets changes in a config on the digits."""

    def loader(split):
        dataset = dict(type='mmwsl.Digits', split=split, pipeline=[dict(type='PackInputs')])
        return dict(
            collate_fn=dict(type='mmwsl.identity_collate', _delete_=True),
            dataset=dict(type='mmwsl.DeviceDataset', dataset=dataset, _delete_=True),
        )

    return dict(train_dataloader=loader('train'), val_dataloader=loader('test'), **kwargs)


def run_digits(work_dir, model, epochs=1, **kwargs):
    runner = Runner.from_cfg(digits_config(work_dir, model, epochs, **kwargs))
    runner.train()
    return runner


class Graphs:
    """A backend of torch.compile that runs a graph as it is, and counts graphs made and graphs run."""

    def __init__(self):
        torch._dynamo.reset()
        self.made = self.runs = 0
        self.convolutions = []  # of each graph

    def __call__(self, graph, inputs):
        self.made += 1
        self.convolutions.append(sum(node.target is torch.conv2d for node in graph.graph.nodes))

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run

    def compile(self, model):
        """As mmengine's Runner does."""
        model.forward = torch.compile(model.forward, backend=self)
        return self


def load_tool(name):
    """A tool as a module, from its path in tools/ without .py."""
    path = ROOT / f'tools/{name}.py'
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return str(found.getsockname()[1])


def launch(script, *args, **env):
    """Run tools/dist_*.sh as a user does, on a port that nobody uses, and return what it said."""
    done = subprocess.run(
        ['bash', f'tools/{script}', *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, 'PYTHON': sys.executable, 'PORT': free_port(), **env},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def tool(name, *args, check=True, **kwargs):
    """Run a tool as a user does, and return the finished process; its output is in ``stdout``."""
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / name), *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)
    assert not check or done.returncode == 0, done.stdout[-4000:]
    return done
