import torch
from mmengine.runner import Runner

from mmwsl.engine.hooks import late_scalars_hook
from tests.tiny import digits_config, distillation

HOOK = dict(runtime_info=dict(type='mmwsl.LateScalarsHook'))


def history(work_dir, default_hooks, **kwargs):
    """What the message hub has of a run of 20 steps in two epochs, and of its last checkpoint."""
    cfg = digits_config(
        work_dir,
        distillation(),
        2,
        custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
        train_dataloader=dict(batch_size=60),
        **kwargs,
    )
    cfg.default_hooks.update(default_hooks)
    cfg.default_hooks.logger.interval = 4
    cfg.default_hooks.checkpoint.update(interval=7, by_epoch=False, save_last=False)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    saved = torch.load(work_dir / 'iter_14.pth', weights_only=False)['message_hub']['log_scalars']
    return [
        {name: buffer.data[0].tolist() for name, buffer in scalars.items() if 'time' not in name}
        for scalars in (runner.message_hub.log_scalars, saved)
    ]


def test_history_is_mmengines_and_is_read_in_one_copy_at_a_turn(tmp_path, monkeypatch):
    expected = history(tmp_path / 'usual', {})
    assert len(expected[0]['train/loss']) == 20 and len(expected[1]['train/loss']) == 14
    copies, values = [], late_scalars_hook._values
    monkeypatch.setattr(late_scalars_hook, 'waits', lambda value: isinstance(value, torch.Tensor))  # as on a GPU
    monkeypatch.setattr(late_scalars_hook, '_values', lambda scalars: copies.append(len(scalars)) or values(scalars))
    found = history(tmp_path / 'late', HOOK)
    assert found == expected
    logged = sum(name.startswith(('train/loss', 'train/distill', 'train/student')) for name in found[0])
    # at the logger's 4th and 8th step, the epoch's 10th, and before each checkpoint
    assert [count // logged for count in copies] == [4, 3, 1, 2, 4, 4, 2]


def test_the_last_steps_of_a_run_by_iterations_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(late_scalars_hook, 'waits', lambda value: isinstance(value, torch.Tensor))
    cfg = digits_config(tmp_path, distillation(), custom_hooks=[], default_hooks=dict(logger=dict(interval=4)))
    cfg.default_hooks.update(HOOK)
    cfg.default_hooks.checkpoint, cfg.log_processor = None, dict(by_epoch=False)
    cfg.train_cfg = dict(by_epoch=False, max_iters=5)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = cfg.param_scheduler = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 5


def test_on_a_cpu_each_step_is_read_at_once(tmp_path):
    assert history(tmp_path / 'late', HOOK) == history(tmp_path / 'usual', {})
