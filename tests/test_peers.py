"""Against MMRazor's own distillation, on real images with a trained teacher."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from tests.tiny import ROOT, tool

STEPS = 50


@pytest.mark.slow
def test_losses_of_fifty_steps_are_those_of_mmrazor(cifar100, published_teacher, tmp_path):
    teacher = tmp_path / 'teacher.pth'
    tool(
        'model_converters/import_teacher.py',
        published_teacher(56),
        teacher,
        '--config',
        ROOT / 'configs/wsl_r56_r20_cifar100.py',
    )
    # MMRazor's teacher draws initial weights before the student does
    student = MODELS.build(Config.fromfile(ROOT / 'configs/vanilla/r20_cifar100_8e.py').model).state_dict()
    torch.save({f'architecture.{key}': value for key, value in student.items()}, tmp_path / 'student.pth')
    ours, theirs = (
        losses_of(name, cifar100, teacher, tmp_path)
        for name in ('wsl_r56_r20_cifar100_8e_eval', 'mmrazor_r56_r20_cifar100_8e')
    )
    assert ours.shape == (2, STEPS) and ours[0].max() > 1.1 * ours[0].min()
    torch.testing.assert_close(ours[:, :10], theirs[:, :10], rtol=1e-10, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def losses_of(name, data_root, teacher, tmp_path):
    """Student's and distillation's loss in each step of the ordinary Runner, with a batch small enough for one core.

    In double precision and with a small learning rate: at the recipe's a difference of rounding grows up to tenfold a
    step, so that in float32 any two curves part after six steps, and in double precision after twenty.
    """
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.merge_from_dict(
        dict(
            work_dir=str(tmp_path / name),
            experiment_name=str(tmp_path / name).replace('/', '_'),
            log_level='ERROR',
            load_from=str(tmp_path / 'student.pth'),
            custom_hooks=[],
            train_cfg=dict(max_epochs=1),
            train_dataloader=dict(
                batch_size=16, num_batch_per_epoch=STEPS, num_workers=0, persistent_workers=False, pin_memory=False
            ),
            val_cfg=None,
            val_dataloader=None,
            val_evaluator=None,
            randomness=dict(seed=0),
            default_hooks=dict(logger=dict(interval=1), checkpoint=dict(save_best=None)),
            optim_wrapper=dict(optimizer=dict(lr=0.002)),
            model=dict(teacher_ckpt=str(teacher)),
        )
    )
    cfg.train_dataloader.dataset.dataset.data_root = str(data_root)
    runner = Runner.from_cfg(cfg)
    runner.model.double()
    runner.model.data_preprocessor.register_forward_hook(
        lambda _, __, batch: {**batch, 'inputs': batch['inputs'].double()}
    )
    runner.train()
    distillation = 'train/distill.loss_wsld' if 'mmrazor' in name else 'train/distill.loss_wsl'
    return torch.tensor([runner.message_hub.get_scalar(key).data[0] for key in ('train/student.loss', distillation)])
