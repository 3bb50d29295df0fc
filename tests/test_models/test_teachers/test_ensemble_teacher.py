import warnings

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from tests.tiny import PREPROCESSOR, ROOT, batch, build, distillation, losses, network, save_teacher, tool

MEMBERS = (network(4), network(2), network(4, depth=14))


@pytest.fixture
def ckpts(tmp_path):
    return [save_teacher(tmp_path / f'{seed}.pth', member, seed) for seed, member in enumerate(MEMBERS)]


def ensemble(ckpts=None, **kwargs):
    return dict(type='mmwsl.EnsembleTeacher', models=list(MEMBERS), ckpts=ckpts, **kwargs)


def members_logits(ckpts, inputs):
    logits = []
    for member, ckpt in zip(MEMBERS, ckpts):
        alone = MODELS.build(member)
        alone.load_state_dict(torch.load(ckpt)['state_dict'])
        alone.eval()
        logits.append(alone(inputs))
    return logits


def built(ckpts, **kwargs):
    model = MODELS.build(ensemble(ckpts, **kwargs))
    model.eval()
    return model


@torch.no_grad()
def test_probabilities_are_averaged_by_default(ckpts):
    inputs = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 50
    a, b, c = (logits.softmax(1) for logits in members_logits(ckpts, inputs))
    torch.testing.assert_close(built(ckpts)(inputs).exp(), (a + b + c) / 3)


@torch.no_grad()
def test_logits_are_averaged_on_demand(ckpts):
    inputs = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b, c = members_logits(ckpts, inputs)
    torch.testing.assert_close(built(ckpts, combine='logits')(inputs), (a + b + c) / 3)


@torch.no_grad()
def test_certain_members_leave_finite_logits(ckpts):
    model = built(ckpts)
    for member in model.members:
        member.head.fc.weight.mul_(1e6)
    logits = model(torch.randn(5, 1, 8, 8))
    assert torch.isfinite(logits).all() and logits.dtype == torch.float32


@pytest.mark.parametrize('combine', ['probabilities', 'logits'])
@torch.no_grad()
def test_one_member_predicts_as_it_does_alone(ckpts, combine):
    model = MODELS.build(
        dict(
            type='mmwsl.EnsembleTeacher',
            models=[MEMBERS[0]],
            ckpts=ckpts[:1],
            combine=combine,
            data_preprocessor=PREPROCESSOR,
        )
    )
    model.eval()
    alone = MODELS.build({**MEMBERS[0], 'data_preprocessor': PREPROCESSOR})
    alone.load_state_dict(torch.load(ckpts[0])['state_dict'])
    alone.eval()
    for ours, theirs, given in zip(model.test_step(batch()), alone.test_step(batch()), batch()['data_samples']):
        torch.testing.assert_close(ours.pred_score, theirs.pred_score)
        assert (ours.pred_label, ours.gt_label) == (theirs.pred_label, given.gt_label)


def test_it_teaches_like_any_other_teacher(ckpts):
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        model = build(distillation(teacher=ensemble(ckpts)))
    model.eval()  # so that the student can be asked twice
    results = losses(model, batch())
    prepared = model.data_preprocessor(batch(), True)
    labels = torch.cat([sample.gt_label for sample in prepared['data_samples']])
    mean = sum(logits.softmax(1) for logits in members_logits(ckpts, prepared['inputs'])) / 3
    loss = model.distiller.distill_losses['loss_wsl']
    torch.testing.assert_close(results['distill.loss_wsl'], loss(model.student(prepared['inputs']), mean.log(), labels))
    assert not any('teacher' in name or 'members' in name for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_without_checkpoints_it_is_untrained():
    with pytest.warns(UserWarning, match='untrained'):
        model = build(distillation(teacher=ensemble()))
    assert model.teacher.members[0].is_init


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(models=[]), 'models is empty'),
        (dict(ckpts=['a.pth']), '3 models need as many ckpts, got 1'),
        (dict(combine='votes'), "combine should be one of .* got 'votes'"),
        (dict(models=[network(4), network(4, classes=7)]), r'the same classes, got \[10, 7\]'),
        (dict(models=[network(4, data_preprocessor=PREPROCESSOR)]), 'set the data_preprocessor of the ensemble'),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**ensemble(), **change})


def test_checkpoint_of_another_member_is_refused(ckpts):
    with pytest.raises(ValueError, match='does not fit this ImageClassifier'):
        MODELS.build(ensemble(ckpts[::-1]))


def test_it_has_no_loss(ckpts):
    with pytest.raises(ValueError, match="no loss, got 'loss'.*Record its logits at 'head'"):
        built(ckpts)(torch.zeros(1, 1, 8, 8), mode='loss')


def test_command_tests_it_without_a_checkpoint(tmp_path, ckpts):
    teacher = ','.join(f'"{ckpt}"' for ckpt in ckpts)
    config = tmp_path / 'wsl_ensemble.py'
    config.write_text(f"""_base_ = '{ROOT}/configs/wsl_digits.py'
model = dict(teacher_ckpt=None, teacher=dict(_delete_=True, type='mmwsl.EnsembleTeacher', models={list(MEMBERS)!r},
                                             ckpts=[{teacher}]))
""")
    done = tool('test.py', config, '--teacher', '--work-dir', tmp_path, cwd=ROOT)
    assert 'accuracy/top1' in done.stdout


@pytest.mark.slow
@torch.no_grad()
def test_published_networks_together_score_what_they_should(tmp_path, cifar100, published_teacher):
    ckpts = [str(tmp_path / f'{depth}.pth') for depth in (56, 44, 32)]
    for depth, ckpt in zip((56, 44, 32), ckpts):
        tool('model_converters/import_teacher.py', published_teacher(depth), ckpt)
    cfg = Config.fromfile(ROOT / 'configs/wsl_r56-r44-r32_r20_cifar100.py')
    cfg.test_dataloader.dataset.data_root = str(cifar100)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    model = build({**cfg.model.teacher, 'ckpts': ckpts, 'data_preprocessor': cfg.data_preprocessor}).eval()
    right = dict(probabilities=0, logits=0)
    for data in Runner.build_dataloader(cfg.test_dataloader):
        data = model.data_preprocessor(data)
        labels = torch.cat([sample.gt_label for sample in data['data_samples']])
        logits = torch.stack([member(data['inputs']) for member in model.members])  # once for both
        for model.combine in right:
            right[model.combine] += int((model._combined(logits).argmax(1) == labels).sum())
    assert right == dict(probabilities=7645, logits=7693)  # of 10,000
