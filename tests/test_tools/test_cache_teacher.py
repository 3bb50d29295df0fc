import os
import sys

import pytest
import torch
from mmengine.runner import Runner

from tests.caches import cached, contents, live, make_cache
from tests.tiny import ROOT, launch, load_tool, save_teacher, tool

EPOCHS, BATCHES = 5, 11  # 55 steps


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('cache_teacher')
    teacher = save_teacher(root / 'teacher.pth')
    make_cache(root / 'cache', run_config(root, teacher, 20), views=EPOCHS)
    return root


def run_config(work_dir, teacher, batch_size, **kwargs):
    """A run whose every epoch is a view of the cache with seed 0."""
    norm = dict(type='GN', num_groups=1)  # sees no other image, so that two processes do what one does
    cfg = live(teacher, work_dir, EPOCHS, images=20 * BATCHES, batch_size=batch_size, **kwargs)
    cfg.model.architecture.backbone.norm_cfg = norm
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=EPOCHS)
    return cfg


def weights(work_dir):
    saved = torch.load(work_dir / f'epoch_{EPOCHS}.pth', weights_only=False)
    assert saved['meta']['iter'] == EPOCHS * BATCHES
    return saved['state_dict']


@pytest.fixture(scope='module')
def taught_live(folder):
    Runner.from_cfg(run_config(folder / 'live', str(folder / 'teacher.pth'), 20)).train()
    return weights(folder / 'live')


@pytest.mark.parametrize('num_workers', [0, 2])
def test_cached_and_live_runs_over_the_same_views_give_the_same_student(folder, taught_live, num_workers):
    work_dir = folder / f'workers{num_workers}'
    cfg = run_config(work_dir, str(folder / 'teacher.pth'), 20, num_workers=num_workers)
    Runner.from_cfg(cached(cfg, folder / 'cache')).train()
    torch.testing.assert_close(weights(work_dir), taught_live, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_build_the_same_cache_and_read_it(folder, taught_live):
    cfg = run_config(folder / 'two', str(folder / 'teacher.pth'), 20)
    cfg.dump(folder / 'live.py')
    told = launch(
        'dist_train.sh',
        folder / 'live.py',
        2,
        '--views',
        EPOCHS,
        '--out',
        folder / 'cache2',
        '--work-dir',
        folder / 'build',
        TOOL='cache_teacher',
    )
    assert 'with 2 process(es)' in told
    assert contents(folder / 'cache2') == contents(folder / 'cache')
    cfg = cached(cfg, folder / 'cache2')
    cfg.train_dataloader.batch_size = 10
    cfg.dump(folder / 'cached.py')
    launch('dist_train.sh', folder / 'cached.py', 2, '--work-dir', folder / 'two')
    torch.testing.assert_close(weights(folder / 'two'), taught_live, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_tools_default_folder_is_where_the_cached_config_looks(tmp_path):
    save_teacher(tmp_path / 'teacher.pth')
    cfg = live(str(tmp_path / 'teacher.pth'), tmp_path / 'work')
    cfg.dump(tmp_path / 'pair.py')
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    tool(
        'cache_teacher.py',
        tmp_path / 'pair.py',
        '--views',
        1,
        '--top-k',
        3,
        '--dtype',
        'float16',
        cwd=tmp_path,
        env=env,
    )
    assert (tmp_path / 'work/teacher_cache/cache.json').exists()
    cached(cfg, tmp_path / 'work/teacher_cache').dump(tmp_path / 'cached.py')
    done = tool('train.py', tmp_path / 'cached.py', cwd=tmp_path, env=env)
    assert 'distill.wsl_weight' in done.stdout
    done = tool('cache_teacher.py', tmp_path / 'cached.py', '--views', 1, check=False, cwd=tmp_path, env=env)
    assert done.returncode == 1 and 'record.top_k is 3 in the cache and None here' in done.stdout


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['--views', '0'], '--views should be at least 1'),
        (['--views', '1', '--amp'], 'leave --amp out'),
        ([], '--views'),
        (['--views', '1', '--dtype', 'int8'], "invalid choice: 'int8'"),
    ],
)
def test_wrong_options(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, 'argv', ['cache_teacher.py', 'config.py', *arguments])
    with pytest.raises(SystemExit):
        load_tool('cache_teacher').parse_args()
    assert message in capsys.readouterr().err
