import copy
import hashlib
import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.hub import get_model
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmwsl.compat import UnsafeCheckpointError
from tests.tiny import (
    PREPROCESSOR,
    batch,
    build,
    digits_config,
    distillation,
    losses,
    network,
    run_digits,
    save_teacher,
)


@pytest.fixture
def model():
    with pytest.warns(UserWarning, match='untrained'):
        return build(distillation())


def test_losses_are_those_of_the_parts(model):
    data = batch()
    model.student.eval()  # so that the student can be asked twice
    results = losses(model, data)
    prepared = model.data_preprocessor(data, True)
    labels = torch.cat([sample.gt_label for sample in prepared['data_samples']])
    student = model.student(prepared['inputs'])
    teacher = model.teacher(prepared['inputs'])
    loss = model.distiller.distill_losses['loss_wsl']
    torch.testing.assert_close(results['student.loss'], nn.functional.cross_entropy(student, labels))
    torch.testing.assert_close(results['distill.loss_wsl'], loss(student, teacher, labels))
    total, logged = model.parse_losses(results)
    # the weight and the share are logged, and are no part of the sum
    torch.testing.assert_close(total, results['student.loss'] + results['distill.loss_wsl'])
    assert {'distill.wsl_weight', 'distill.regularization_share'} <= logged.keys()


def test_teacher_is_in_eval_mode_down_to_dropout_and_drop_path():
    head = dict(type='StackedLinearClsHead', num_classes=10, in_channels=16, mid_channels=[8], dropout_rate=0.5)
    teacher = {**network(4), 'head': head}
    model = build(distillation(teacher=teacher))
    model.eval()
    model.train()
    assert not any(module.training for module in model.teacher.modules())
    assert any(isinstance(module, nn.Dropout) for module in model.teacher.modules())
    inputs = model.data_preprocessor(batch(), False)['inputs']
    torch.testing.assert_close(model.teacher(inputs), model.teacher(inputs), rtol=0, atol=0)


def test_batch_statistics_leave_the_running_ones_as_loaded():
    model = build(distillation(teacher_norm_eval=False))
    before = copy.deepcopy(model.teacher.state_dict())
    inputs = model.data_preprocessor(batch(), True)['inputs']
    model.train()
    losses(model, batch())
    training = model.teacher(inputs)
    torch.testing.assert_close(model.teacher.state_dict(), before, rtol=0, atol=0)
    norm = model.teacher.backbone.bn1
    features = norm(model.teacher.backbone.conv1(inputs))
    torch.testing.assert_close(features.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    model.eval()  # and validation uses the running ones
    torch.testing.assert_close(model.teacher(inputs), reference_teacher(before)(inputs))
    assert not torch.allclose(training, model.teacher(inputs))


def reference_teacher(weights):
    teacher = MODELS.build(network(4))
    teacher.load_state_dict(weights)
    teacher.eval()
    return teacher


def test_teacher_is_no_part_of_the_model_but_follows_it(model):
    assert not any('teacher' in name for name in model.state_dict())
    assert not any('teacher' in name for name, _ in model.named_modules())
    mine = {id(parameter) for parameter in model.parameters()}
    assert not any(id(parameter) in mine or parameter.requires_grad for parameter in model.teacher.parameters())
    model.to(torch.float64)
    assert next(model.teacher.parameters()).dtype == torch.float64
    assert next(model.student.parameters()).dtype == torch.float64


def test_copy_has_a_teacher_of_its_own_that_works(model):
    clone = copy.deepcopy(model)
    model.student.eval(), clone.student.eval()
    torch.testing.assert_close(losses(clone, batch()), losses(model, batch()))
    assert clone.teacher is not model.teacher


def test_no_loss_is_computed_for_the_teacher(model, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('the teacher computed a loss')

    monkeypatch.setattr(model.teacher.head, 'loss', fail)
    losses(model, batch())


def test_recorder_in_the_teachers_loss_makes_it_run_in_loss_mode():
    recorders = dict(logits=dict(type='ModuleInputs', source='head.loss_module'))
    mappings = dict(
        loss_wsl=dict(
            preds_S=dict(recorder='hard_loss', from_student=True, data_idx=0),
            preds_T=dict(recorder='logits', from_student=False, data_idx=0),
            gt_labels=dict(recorder='hard_loss', from_student=True, data_idx=1),
        )
    )
    distiller = dict(type='mmwsl.WSLDistiller', teacher_recorders=recorders, loss_forward_mappings=mappings)
    torch.manual_seed(0)
    through_loss = build(distillation(distiller=distiller))
    torch.manual_seed(0)
    plain = build(distillation())
    for _ in range(2):  # the first batch finds out, the second knows
        torch.testing.assert_close(losses(through_loss, batch()), losses(plain, batch()))


def test_delivery_in_the_head_makes_the_student_see_what_the_teacher_saw():
    method = 'mmpretrain.models.heads.cls_head.ClsHead._get_loss'
    deliveries = dict(loss=dict(type='MethodOutputs', max_keep_data=1, method_path=method))
    distiller = dict(
        type='mmwsl.WSLDistiller',
        distill_deliveries=deliveries,
        distill_losses={'loss_kd': dict(type='KLDivergence', tau=4.0)},
        loss_forward_mappings=dict(
            loss_kd=dict(
                preds_S=dict(recorder='logits', from_student=True), preds_T=dict(recorder='logits', from_student=False)
            )
        ),
        student_recorders=dict(logits=dict(type='ModuleOutputs', source='head')),
    )
    model = build(distillation(distiller=distiller))
    for step in range(2):
        data = batch(seed=step)
        prepared = model.data_preprocessor(data, True)
        labels = torch.cat([sample.gt_label for sample in prepared['data_samples']])
        teacher = nn.functional.cross_entropy(model.teacher(prepared['inputs']), labels)
        torch.testing.assert_close(losses(model, data)['student.loss'], teacher)


def three_channels(cfg):
    cfg['backbone']['in_channels'] = 3
    return cfg


@pytest.mark.parametrize(
    'own',
    [
        dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=False),
        dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=True),
        dict(mean=[120.0, 110.0, 100.0], std=[70.0, 60.0, 50.0], to_rgb=True),
    ],
)
def test_teacher_with_its_own_preprocessor_sees_its_own_kind_of_input(own):
    own = dict(type='mmpretrain.ClsDataPreprocessor', **own)
    student = dict(type='mmpretrain.ClsDataPreprocessor', mean=[90.0, 100.0, 105.0], std=[40.0, 41.0, 42.0])
    torch.manual_seed(0)
    model = build(
        distillation(
            architecture=three_channels(network(2)),
            teacher=three_channels(network(4, data_preprocessor=own)),
            data_preprocessor=student,
        )
    )
    data = batch(channels=3)
    reference = MODELS.build(three_channels(network(4)))
    reference.load_state_dict(model.teacher.state_dict())
    reference.eval()
    expected = reference(MODELS.build(own)(data, False)['inputs'])
    inputs = model.data_preprocessor(data, False)['inputs']
    torch.testing.assert_close(model.teacher(inputs), expected)
    torch.testing.assert_close(model.teacher(inputs=inputs), expected)  # as val_step calls it


@pytest.mark.parametrize(
    'own, expected', [(dict(type='mmpretrain.ClsDataPreprocessor'), 'raw'), (None, 'as the student')]
)
def test_teacher_whose_preprocessor_does_not_normalise(own, expected):
    # named in its config, it wants raw pixels; not named, the teacher takes what there is
    model = build(distillation(teacher=network(4, data_preprocessor=own)))
    data = batch()
    inputs = model.data_preprocessor(data, False)['inputs']
    reference = reference_teacher(model.teacher.state_dict())
    seen = data['inputs'].float() if expected == 'raw' else inputs
    torch.testing.assert_close(model.teacher(inputs), reference(seen))


def test_padding_stays_padding_for_a_teacher_with_another_normalisation():
    own = dict(type='mmpretrain.ClsDataPreprocessor', mean=[1.0], std=[2.0], pad_size_divisor=16, pad_value=-3)
    model = build(
        distillation(
            teacher=network(4, data_preprocessor=own), data_preprocessor=dict(PREPROCESSOR, pad_size_divisor=16)
        )
    )
    data = batch()
    for sample in data['data_samples']:
        sample.set_metainfo(dict(img_shape=(8, 8)))
    data = model.data_preprocessor(data, False)
    raw = data['inputs'] * PREPROCESSOR['std'][0] + PREPROCESSOR['mean'][0]
    expected = torch.full((6, 1, 16, 16), -3.0)
    expected[:, :, :8, :8] = (raw[:, :, :8, :8] - 1) / 2
    reference = reference_teacher(model.teacher.state_dict())
    torch.testing.assert_close(model.teacher(data['inputs'], data['data_samples']), reference(expected))
    torch.testing.assert_close(
        model.teacher(inputs=data['inputs'], data_samples=data['data_samples']), reference(expected)
    )


def test_mixup_in_the_students_own_train_cfg_is_kept():
    student = network(2, train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)]))
    model = build(distillation(architecture=student))
    losses(model, batch())
    targets = model.distiller.student_recorders.get_recorder('hard_loss').get_record_data(0, 1)
    assert targets.shape == (6, 10) and (targets.max(1).values < 1).any()


def test_recorder_on_a_synchronised_norm_layer_keeps_its_source():
    teacher = network(4)
    teacher['backbone']['norm_cfg'] = dict(type='SyncBN')
    recorders = dict(features=dict(type='ModuleOutputs', source='backbone.bn1'))
    model = build(distillation(teacher=teacher, distiller=dict(type='mmwsl.WSLDistiller', teacher_recorders=recorders)))
    losses(model, batch())
    recorded = model.distiller.teacher_recorders.get_recorder('features').get_record_data()
    assert recorded.shape == (6, 4, 8, 8)


def test_each_of_two_losses_has_its_weight_logged():
    two = dict(loss_a=dict(type='mmwsl.WSLLoss', tau=2.0), loss_b=dict(type='mmwsl.WSLLoss', tau=4.0))
    results = losses(build(distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=two))), batch())
    assert {'distill.wsl_weight', 'distill.wsl_weight_2', 'distill.regularization_share_2'} <= results.keys()


def test_a_run_with_one_cycle_resumes(tmp_path):
    for epochs in (1, 2):
        cfg = digits_config(tmp_path, network(2), epochs, custom_hooks=[], resume=epochs == 2)
        cfg.param_scheduler = dict(type='OneCycleLR', eta_max=0.1, total_steps=12, by_epoch=False)
        runner = Runner.from_cfg(cfg)
        runner.train()
    assert runner.iter == 12


def test_teacher_that_normalises_needs_a_student_that_does():
    with pytest.raises(ValueError, match='set mean and std of the student.s as well'):
        build(
            distillation(
                teacher=network(4, data_preprocessor=PREPROCESSOR),
                data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
            )
        )


def test_preprocessors_of_other_channels_are_refused():
    own = dict(type='mmpretrain.ClsDataPreprocessor', mean=[1.0] * 3, std=[2.0] * 3)
    with pytest.raises(ValueError, match="teacher's data_preprocessor has 3 channels and the student's 1"):
        build(distillation(teacher=network(4, data_preprocessor=own)))


def test_checkpoint_of_mmrazor_that_holds_a_teacher_loads(model):
    init_default_scope('mmpretrain')
    distiller = dict(type='mmrazor.ConfigurableDistiller')
    theirs = MODELS.build(
        dict(
            type='mmrazor.SingleTeacherDistill',
            architecture=network(2),
            teacher=network(4),
            data_preprocessor=PREPROCESSOR,
            distiller=distiller,
        )
    )
    assert any(key.startswith('teacher.') for key in theirs.state_dict())
    model.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(model.student.state_dict(), theirs.student.state_dict())


def test_teacher_is_loaded_and_stays_through_init_weights(tmp_path):
    path = save_teacher(tmp_path / 'teacher.pth')
    torch.manual_seed(5)
    model = build(distillation(teacher_ckpt=path))
    torch.testing.assert_close(dict(model.teacher.state_dict()), dict(torch.load(path)['state_dict']), rtol=0, atol=0)


def test_init_cfg_of_the_teacher_is_loaded_as_strictly(tmp_path):
    path = save_teacher(tmp_path / 'teacher.pth')
    model = build(distillation(teacher=network(4, init_cfg=dict(type='Pretrained', checkpoint=path))))
    torch.testing.assert_close(dict(model.teacher.state_dict()), dict(torch.load(path)['state_dict']), rtol=0, atol=0)


def test_student_of_a_distillation_can_be_the_next_teacher(tmp_path, model):
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'distilled.pth')
    following = build(distillation(teacher=network(2), teacher_ckpt=str(tmp_path / 'distilled.pth')))
    torch.testing.assert_close(following.teacher.state_dict(), model.student.state_dict())


def test_teacher_that_does_not_fit_is_refused_with_its_keys(tmp_path):
    path = tmp_path / 'teacher.pth'
    weights = build(network(4)).state_dict()
    weights['head.fc.other'] = weights.pop('head.fc.bias')
    weights['backbone.conv1.weight'] = torch.zeros(4, 3, 3, 3)
    torch.save(weights, path)
    with pytest.raises(ValueError) as error:
        build(distillation(teacher_ckpt=str(path)))
    for text in (
        str(path),
        'missing: head.fc.bias',
        'unexpected: head.fc.other',
        'of another shape: backbone.conv1.weight: copying a param with shape torch.Size([4, 3, 3, 3]) from',
        'import_teacher.py',
    ):
        assert text in str(error.value)


def test_missing_teacher_file_says_what_to_do():
    with pytest.raises(FileNotFoundError, match=r"no checkpoint 'nowhere\.pth'.*configs/vanilla/"):
        build(distillation(teacher_ckpt='nowhere.pth'))


def test_file_without_weights_says_what_it_holds(tmp_path):
    torch.save(dict(epoch=3), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r"holds no state dict.*keys \['epoch'\]"):
        build(distillation(teacher_ckpt=str(tmp_path / 'x.pth')))


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_teacher_that_would_run_code_is_refused(tmp_path):
    _RunsCode.target = str(tmp_path / 'it-ran')
    torch.save(dict(state_dict=_RunsCode()), tmp_path / 'teacher.pth')
    with pytest.raises(UnsafeCheckpointError, match='could run code'):
        build(distillation(teacher_ckpt=str(tmp_path / 'teacher.pth')))
    assert not (tmp_path / 'it-ran').exists()


def test_trainable_teacher_is_refused():
    with pytest.raises(ValueError, match='keeps its teacher frozen'):
        build(distillation(teacher_trainable=True))


def test_stop_distill_hook_stops_the_distillation(tmp_path):
    hooks = [dict(type='mmrazor.StopDistillHook', stop_epoch=1)]
    runner = run_digits(tmp_path, distillation(), epochs=2, custom_hooks=hooks)
    assert runner.model.distillation_stopped
    logged = runner.message_hub.log_scalars
    assert len(logged['train/distill.loss_wsl'].data[0]) == 6
    assert len(logged['train/student.loss'].data[0]) == 12


def test_validation_loop_of_mmrazor_scores_the_teacher_with_its_own_input(tmp_path):
    path = save_teacher(tmp_path / 'teacher.pth')
    own = dict(type='mmpretrain.ClsDataPreprocessor', mean=[3.0], std=[2.0])
    model = distillation(teacher=network(4, data_preprocessor=own), teacher_ckpt=path)
    runner = run_digits(
        tmp_path, model, custom_hooks=[], val_cfg=dict(type='mmrazor.SingleTeacherDistillValLoop', _delete_=True)
    )
    teacher = runner.message_hub.get_scalar('val/teacher.accuracy/top1').current()
    alone = run_digits(
        tmp_path / 'alone',
        network(4, data_preprocessor=own),
        load_from=path,
        custom_hooks=[],
        optim_wrapper=dict(optimizer=dict(lr=0.0)),
    )
    alone.load_checkpoint(path)
    assert teacher == pytest.approx(alone.val_loop.run()['accuracy/top1'])


def test_ema_hook_holds_no_teacher(tmp_path):
    runner = run_digits(tmp_path, distillation(), custom_hooks=[dict(type='EMAHook')])
    checkpoint = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert 'ema_state_dict' in checkpoint
    assert not any('teacher' in key for part in ('state_dict', 'ema_state_dict') for key in checkpoint[part])
    assert runner.iter == 6


def test_mixed_precision_trains(tmp_path, monkeypatch):
    # mmengine asks for a GPU; on a CPU the same code runs in bfloat16
    monkeypatch.setattr('mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True)
    runner = run_digits(
        tmp_path, distillation(), custom_hooks=[], optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16')
    )
    logged = runner.message_hub.get_scalar('train/distill.loss_wsl').data[0]
    assert len(logged) == 6 and all(0 < value < 1e3 for value in logged)


def test_learning_rate_scales_with_the_batch(tmp_path):
    runner = run_digits(tmp_path, distillation(), custom_hooks=[], auto_scale_lr=dict(enable=True))
    assert runner.optim_wrapper.optimizer.param_groups[0]['initial_lr'] == pytest.approx(0.2)  # 100 / 50 * 0.1


def test_every_step_is_logged(tmp_path):
    runner = run_digits(tmp_path, distillation(), custom_hooks=[])
    for name in ('student.loss', 'distill.loss_wsl', 'distill.wsl_weight', 'distill.regularization_share'):
        assert len(runner.message_hub.get_scalar(f'train/{name}').data[0]) == 6


@pytest.mark.parametrize('to_rgb', [True, False])
def test_channels_are_swapped_for_the_teacher_where_nothing_normalises(to_rgb):
    own = dict(type='mmpretrain.ClsDataPreprocessor', to_rgb=to_rgb)
    model = build(
        distillation(
            architecture=three_channels(network(2)),
            teacher=three_channels(network(4, data_preprocessor=own)),
            data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
        )
    )
    seen = []
    model.teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = torch.rand(2, 3, 8, 8)
    model.teacher(inputs, mode='tensor')
    torch.testing.assert_close(seen[0], inputs[:, [2, 1, 0]] if to_rgb else inputs)


def test_mixing_that_the_preprocessor_cannot_do():
    mixing = network(2, train_cfg=dict(augments=[dict(type='Mixup', alpha=0.2)]))
    with pytest.raises(ValueError, match='mixes images.*a ImgDataPreprocessor, cannot do: use mmpretrain.ClsData'):
        build(distillation(architecture=mixing, data_preprocessor=dict(type='mmengine.ImgDataPreprocessor')))


def test_without_gradient_there_is_none(model):
    with torch.no_grad():
        found = losses(model, batch())
    assert not any(value.requires_grad for value in found.values())


def test_a_checkpoint_without_a_student_is_refused(tmp_path, model):
    path = save_teacher(tmp_path / 'network.pth', network(2))
    with pytest.raises(ValueError, match=r"no student: .* with 'architecture\.'.*model\.architecture\.init_cfg"):
        run_digits(tmp_path, distillation(), load_from=path)
    model.load_state_dict(model.state_dict())


# ---- another network in place of the teacher's


def shifted():
    """A teacher with its own kind of input, and logits unlike those of the fixture's."""
    own = dict(type='mmpretrain.ClsDataPreprocessor', mean=[3.0], std=[2.0])
    torch.manual_seed(7)
    return build(network(4, data_preprocessor=own))


def answer_alone(net, data):
    """What a network says of raw images, by its own preprocessor."""
    with torch.no_grad():
        return net(net.data_preprocessor(copy.deepcopy(data), False)['inputs'])


def recorded(model):
    return model.distiller.get_record('logits', from_student=False)


@pytest.mark.parametrize('speed', ['plain', 'fold'])
def test_an_assigned_network_teaches_and_is_no_submodule(speed):
    model = build(distillation(teacher_speed=speed))
    losses(model, batch())
    old, new = model.teacher, shifted().train()
    alone = copy.deepcopy(new).eval()
    keys = list(model.state_dict())
    model.teacher = new
    assert model.teacher is new and list(model.state_dict()) == keys
    assert not any(module is new for module in model.modules())
    assert not any(module.training for module in new.modules())
    assert not any(parameter.requires_grad for parameter in new.parameters())
    for seed in range(2):
        losses(model, batch(seed=seed))
        expected = answer_alone(alone, batch(seed=seed))
        torch.testing.assert_close(recorded(model), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    model.double()
    assert next(new.parameters()).dtype == torch.float64 and next(old.parameters()).dtype == torch.float32


def test_a_replaced_network_is_what_it_was_and_can_come_back(model):
    first, second = model.teacher, shifted().eval()
    own = second.data_preprocessor
    expected = answer_alone(second, batch())
    model.teacher = second
    model.teacher = first
    assert second.data_preprocessor is own
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in second.modules())
    model.teacher = second
    losses(model, batch())
    assert len(model.distiller.teacher_recorders.get_recorder('logits').data_buffer) == 1
    torch.testing.assert_close(recorded(model), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_an_assigned_network_may_predict_with_batch_statistics():
    model = build(distillation(teacher_norm_eval=False))
    model.teacher = build(network(4))
    before = copy.deepcopy(model.teacher.state_dict())
    assert model.teacher.backbone.bn1.training
    losses(model, batch())
    torch.testing.assert_close(model.teacher.state_dict(), before, rtol=0, atol=0)


def test_an_assigned_network_goes_where_the_model_is():
    model = build(distillation(data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'))).to('meta')
    model.teacher = build(network(4))
    assert {parameter.device.type for parameter in model.teacher.parameters()} == {'meta'}


def test_what_cannot_teach_is_not_assigned():
    recorders = dict(features=dict(type='mmrazor.ModuleOutputs', source='neck'))
    model = build(distillation(distiller=dict(type='mmwsl.WSLDistiller', teacher_recorders=recorders)))
    old, without_neck = model.teacher, build(network(4))
    del without_neck.neck
    with pytest.raises(TypeError, match=r"a BaseModel of mmengine, got <class '.*Linear'>"):
        model.teacher = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='"neck" is not in the model.*Name one of its modules'):
        model.teacher = without_neck
    assert model.teacher is old and 'teacher' not in model._modules
    assert losses(model, batch())['distill.loss_wsl'] > 0


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=['deepcopy', 'pickle']
)
def test_a_model_is_copied_after_a_step(model, copied):
    model.parse_losses(losses(model, batch()))[0].backward()
    twin = copied(model)
    model.student.eval(), twin.student.eval()
    torch.testing.assert_close(losses(twin, batch(seed=1)), losses(model, batch(seed=1)), rtol=0, atol=0)
    assert twin.teacher is not model.teacher and 'teacher' not in twin._modules
    twin.teacher.head.fc.bias.data[0] += 1
    assert not torch.equal(losses(twin, batch())['distill.loss_wsl'], losses(model, batch())['distill.loss_wsl'])


# ---- the teacher's file, by its hash


@pytest.fixture
def two_teachers(tmp_path):
    """Two files, with the SHA-256 of each."""
    files = [save_teacher(tmp_path / f'{seed}.pth', seed=seed) for seed in (1, 2)]
    return files, [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(
    'stated',
    [lambda digest: digest, lambda digest: digest[:8].upper(), lambda digest: [digest], lambda digest: None],
    ids=['whole', 'eight digits', 'list', 'none'],
)
def test_the_teachers_file_is_known_by_its_hash(two_teachers, stated):
    (file, other), (digest, _) = two_teachers
    assert build(distillation(teacher_ckpt=file, teacher_sha256=stated(digest))).teacher_sha256 == [digest]
    if stated(digest):
        with pytest.raises(ValueError, match=r'2\.pth is not the file that model\.teacher_sha256 names: its SHA-256'):
            build(distillation(teacher_ckpt=other, teacher_sha256=stated(digest)))


def test_so_is_each_of_an_ensembles(two_teachers):
    files, digests = two_teachers

    def ensemble(**kwargs):
        teacher = dict(type='mmwsl.EnsembleTeacher', models=[network(4)] * 2, ckpts=files)
        return build(distillation(teacher=teacher, **kwargs))

    assert ensemble(teacher_sha256=digests).teacher_sha256 == digests
    with pytest.raises(ValueError, match=r'1\.pth is not the file'):
        ensemble(teacher_sha256=digests[::-1])
    with pytest.raises(ValueError, match=r'one SHA-256 for each of the 2 files of the teacher \(.*1.pth, .*\), got 1'):
        ensemble(teacher_sha256=digests[0])


@pytest.mark.parametrize('wrong', ['abc', 'sha256:0123456789', ''])
def test_a_hash_that_is_none_is_refused(two_teachers, wrong):
    with pytest.raises(ValueError, match='(at least eight hexadecimal digits|one SHA-256 for each of the 0)'):
        build(distillation(teacher_ckpt=two_teachers[0][0] if wrong else None, teacher_sha256=wrong or 'a' * 8))


def test_a_file_of_another_storage_cannot_be_compared(two_teachers):
    with pytest.raises(ValueError, match='cannot be compared with s3://bucket/net.pth, which is no local file'):
        build(distillation(teacher_ckpt='s3://bucket/net.pth', teacher_sha256='a' * 8))


def test_a_teacher_from_the_web_is_known_by_its_hash(two_teachers, tmp_path, monkeypatch):
    (file, _), (digest, other) = two_teachers
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, place, progress: shutil.copy(file, place))
    url = 'https://example.invalid/net.pth'
    assert build(distillation(teacher_ckpt=url, teacher_sha256=digest)).teacher_sha256 == [digest]
    with pytest.raises(ValueError, match='https://example.invalid/net.pth is not the file'):
        build(distillation(teacher_ckpt=url, teacher_sha256=other))


def test_a_replaced_teacher_is_of_no_file(two_teachers):
    model = build(distillation(teacher_ckpt=two_teachers[0][0]))
    model.teacher = build(network(4))
    assert model.teacher_sha256 == []


# ---- models of other packages

LENET = 'mmpretrain::lenet/lenet5_mnist.py'  # mean 33.46, std 78.87; images of 32 x 32


@pytest.fixture
def published(tmp_path, monkeypatch):
    """LeNet's weights, as if mmpretrain had published them."""
    init_default_scope('mmpretrain')
    torch.manual_seed(3)
    weights = get_model(LENET).state_dict()
    torch.save(dict(state_dict=weights), tmp_path / 'lenet.pth')
    monkeypatch.setattr(
        'mmengine.hub.hub._get_cfg_metainfo',
        lambda package, path: dict(Config='configs/lenet/lenet5_mnist.py', Weights=str(tmp_path / 'lenet.pth')),
    )
    return weights


def batch32():
    return {**batch(), 'inputs': batch()['inputs'].repeat(1, 1, 4, 4)}


def test_teacher_and_student_of_another_package(published, recwarn):
    model = build(
        distillation(architecture=dict(cfg_path=LENET, pretrained=False), teacher=dict(cfg_path=LENET, pretrained=True))
    )
    assert not any('untrained' in str(warning.message) for warning in recwarn)
    torch.testing.assert_close(dict(model.teacher.state_dict()), dict(published), rtol=0, atol=0)
    assert not torch.equal(
        model.student.state_dict()['backbone.features.0.weight'], published['backbone.features.0.weight']
    )
    loss = model.parse_losses(losses(model, batch32()))[0]
    loss.backward()
    assert all(weight.grad is not None for weight in model.student.parameters())
    expected = answer_alone(get_model(LENET, pretrained=True).eval(), batch32())  # by its config's mean and std
    torch.testing.assert_close(recorded(model), expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    mine = model.data_preprocessor
    assert mine.mean.item() == pytest.approx(4.9) and model.teacher.data_preprocessor is mine


@pytest.mark.parametrize(
    'own, seen',
    [
        ('', 'as the student'),
        ('data_preprocessor = dict(num_classes=10)', 'raw'),
        ("model['data_preprocessor'] = dict(num_classes=10)", 'raw'),
    ],
)
def test_teacher_of_another_package_that_does_not_normalise(tmp_path, monkeypatch, own, seen):
    (tmp_path / 'lenet.py').write_text(f"""
model = dict(type='ImageClassifier', backbone=dict(type='LeNet5', num_classes=10), head=dict(type='ClsHead'))
{own}
""")
    monkeypatch.setattr('mmengine.hub.hub._get_cfg_metainfo', lambda *_: dict(Config=str(tmp_path / 'lenet.py')))
    model = build(distillation(architecture=dict(cfg_path=LENET), teacher=dict(cfg_path=LENET)))
    alone = get_model(LENET).eval()
    alone.load_state_dict(model.teacher.state_dict())
    inputs = model.data_preprocessor(batch32(), False)['inputs']
    expected = alone(batch32()['inputs'].float() if seen == 'raw' else inputs)
    torch.testing.assert_close(model.teacher(inputs), expected)


def test_student_of_another_package_keeps_its_weights(published):
    model = build(
        distillation(
            architecture=dict(cfg_path=LENET, pretrained=True), teacher=dict(cfg_path=LENET), data_preprocessor=None
        )
    )
    torch.testing.assert_close(dict(model.student.state_dict()), dict(published), rtol=0, atol=0)
    assert model.data_preprocessor.mean.item() == pytest.approx(33.46)  # its own


def test_teacher_of_another_package_without_weights_is_said_to_be_untrained():
    with pytest.warns(UserWarning, match='the teacher is untrained'):
        build(distillation(teacher=dict(cfg_path=LENET, pretrained=False)))


# ---- the weight of the student's own losses


def with_accuracy(cfg):
    cfg['head']['cal_acc'] = True
    return cfg


def test_the_students_own_losses_are_weighted_and_nothing_else():
    found = []
    for weight in (1.0, 0.1):
        torch.manual_seed(0)
        model = build(distillation(architecture=with_accuracy(network(2)), student_loss_weight=weight))
        found.append(losses(model, batch()))
    plain, weighted = found
    assert torch.equal(weighted['student.loss'], 0.1 * plain['student.loss'])
    assert plain.keys() == weighted.keys() >= {'student.accuracy_top-1', 'distill.loss_wsl', 'distill.wsl_weight'}
    for key in plain.keys() - {'student.loss'}:
        torch.testing.assert_close(weighted[key], plain[key], rtol=0, atol=0)
    total, logged = model.parse_losses(weighted)
    assert total.item() == pytest.approx(0.1 * plain['student.loss'].item() + plain['distill.loss_wsl'].item())
    assert logged['student.accuracy_top-1'] == plain['student.accuracy_top-1'][0]


def test_lists_of_losses_are_weighted(monkeypatch):
    model = build(distillation(student_loss_weight=0.5))
    model.distillation_stopped = True
    one, two = torch.tensor(1.0), torch.tensor([2.0, 4.0])
    monkeypatch.setattr(
        model.student.head, 'loss', lambda *_, **__: dict(loss_cls=[one, two], aux_loss=two, iou=two, counts=[one, two])
    )
    found = losses(model, batch())
    torch.testing.assert_close(
        found,
        {
            'student.loss_cls': [torch.tensor(0.5), torch.tensor([1.0, 2.0])],
            'student.aux_loss': torch.tensor([1.0, 2.0]),
            'student.iou': two,
            'student.counts': [one, two],
        },
    )


@pytest.mark.parametrize('weight', [-0.1, math.nan, math.inf, '0.1', None])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(ValueError, match='student_loss_weight should be a finite number of at least 0, got'):
        build(distillation(student_loss_weight=weight))


def test_a_weight_of_losses_that_are_not_calculated_is_refused():
    with pytest.raises(ValueError, match=r'student_loss_weight=0\.5 .*calculate_student_loss=False leaves out'):
        build(distillation(student_loss_weight=0.5, calculate_student_loss=False))
    found = losses(build(distillation(calculate_student_loss=False)), batch())
    assert not any(key.startswith('student') for key in found)


# ---- one data_preprocessor


def mixing(kind='Mixup'):
    return dict(augments=dict(type=kind, alpha=0.8))


@pytest.mark.parametrize(
    'own, refused',
    [
        (dict(mean=[5.0], std=[6.0]), 'mean'),
        (dict(mean=[4.9], std=[7.0], num_classes=10), 'std'),
        (dict(mean=[4.9], std=[6.0], to_rgb=True), 'to_rgb'),
        (dict(pad_size_divisor=32), 'pad_size_divisor'),
        (dict(mean=[4.9], std=[6.0], to_rgb=False), None),
        (dict(num_classes=10), None),
        (None, None),
    ],
)
def test_a_students_preprocessor_is_not_ignored(own, refused):
    cfg = distillation(architecture=network(2, data_preprocessor=own))
    if refused is None:
        assert build(cfg).data_preprocessor.mean.item() == pytest.approx(4.9)
        return
    with pytest.raises(
        ValueError,
        match=rf'model\.architecture sets {refused} of its data_preprocessor, which is not '
        "used: the config's data_preprocessor prepares",
    ):
        build(cfg)


def test_a_students_preprocessor_is_used_if_there_is_no_other():
    own = dict(mean=[5.0], std=[6.0], num_classes=10)
    model = build(distillation(architecture=network(2, data_preprocessor=own), data_preprocessor=None))
    assert model.data_preprocessor is model.student.data_preprocessor
    assert model.data_preprocessor.mean.item() == pytest.approx(5.0)


@pytest.mark.parametrize('kind, refused', [('Mixup', False), ('CutMix', True)])
def test_images_are_mixed_in_one_way(kind, refused):
    losses_of_scores = dict(loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='SoftCrossEntropy')))
    cfg = distillation(
        architecture=network(2, train_cfg=mixing()),
        data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing(kind)),
        distiller=dict(type='mmwsl.WSLDistiller', distill_losses=losses_of_scores),
    )
    if not refused:
        assert type(build(cfg).data_preprocessor.batch_augments.augments[0]).__name__ == 'Mixup'
        return
    with pytest.raises(ValueError, match=r'model\.architecture sets batch_augments \(train_cfg\) of its data_prepr'):
        build(cfg)


# ---- learning rates by depth


def vit():
    arch = dict(embed_dims=8, num_layers=2, num_heads=2, feedforward_channels=8)
    return dict(
        type='ImageClassifier',
        _scope_='mmpretrain',
        head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=8),
        backbone=dict(type='VisionTransformer', arch=arch, img_size=8, patch_size=4, in_channels=1),
    )


def rates_by_depth(model):
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=1.0, weight_decay=0.0),
            paramwise_cfg=dict(layer_decay_rate=0.5),
            constructor='LearningRateDecayOptimWrapperConstructor',
        ),
    )
    return {group['param_name']: group['lr'] for group in wrapper.optimizer.param_groups}


def test_learning_rates_follow_the_students_depth():
    connectors = dict(c=dict(type='mmrazor.ConvModuleConnector', in_channel=1, out_channel=1))
    rates = rates_by_depth(
        build(distillation(architecture=vit(), distiller=dict(type='mmwsl.WSLDistiller', connectors=connectors)))
    )
    student = rates_by_depth(build(vit()))
    assert {name: rate for name, rate in rates.items() if name.startswith('architecture.')} == {
        f'architecture.{name}': rate for name, rate in student.items()
    }
    # two layers between the embedding and the head
    assert rates['architecture.backbone.patch_embed.projection.weight'] == 0.125
    assert rates['architecture.backbone.layers.0.ln1.weight'] == 0.25
    assert rates['architecture.head.layers.head.weight'] == 1.0
    assert {rate for name, rate in rates.items() if name.startswith('distiller.connectors.')} == {1.0}


def test_student_that_does_not_know_its_depth_says_so():
    with pytest.raises(NotImplementedError, match='needs a student with get_layer_depth.*its CIFARResNet lacks'):
        rates_by_depth(build(distillation()))
