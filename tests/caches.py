"""Small teacher caches for the tests: augmented digits and a tiny teacher."""

import copy

from mmwsl.engine.cache_building import build_cache
from tests.tiny import digits_config, distillation

PIPELINE: list[dict] = [
    dict(type='RandomCrop', crop_size=8, padding=1),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]


def live(teacher_ckpt, work_dir='work_dirs/test', epochs=1, images=100, batch_size=20, num_workers=0, **model):
    """A short run over augmented digits, with a teacher in eval mode."""
    cfg = digits_config(work_dir, distillation(teacher_ckpt=teacher_ckpt, **model), epochs, custom_hooks=[])
    cfg.train_dataloader.update(batch_size=batch_size, num_workers=num_workers)
    cfg.train_dataloader.dataset.dataset.update(pipeline=copy.deepcopy(PIPELINE), indices=images)
    return cfg


def cached(cfg, folder):
    """The same run over a cache: two lines."""
    cfg = copy.deepcopy(cfg)
    cfg.model.teacher_cache = str(folder)
    cfg.train_dataloader.dataset.update(type='mmwsl.CachedViews', cache=str(folder))
    return cfg


def make_cache(folder, cfg, views=2, **options):
    build_cache(cfg, folder, views, **options)
    return folder


def contents(folder):
    """All files by name, without what a build notes of its machine."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'lock'}
