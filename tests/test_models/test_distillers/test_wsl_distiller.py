import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmrazor.models.losses import KLDivergence

from mmwsl.models import WSLLoss
from mmwsl.models.distillers.wiring import MAPPINGS
from tests.tiny import PREPROCESSOR, batch, build, distillation, losses, network

LOGITS = dict(type='mmrazor.ModuleOutputs', source='head.fc')
TARGETS = dict(type='mmrazor.ModuleInputs', source='head.loss_module')
WIRING = dict(
    preds_S=dict(recorder='fc', from_student=True),
    preds_T=dict(recorder='fc', from_student=False),
    gt_labels=dict(recorder='targets', from_student=True, data_idx=1),
)
WSL = dict(type='mmwsl.WSLLoss', tau=3.0, loss_weight=2.0)


def step(model, data=None):
    """One real training step; returns what is logged, and whether each parameter of the student moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.clone() for parameter in model.architecture.parameters()]
    total, logged = model.parse_losses(losses(model, data or batch()))
    total.backward()
    optimizer.step()
    pairs = zip(before, model.architecture.parameters(), strict=True)
    return logged, [not torch.equal(old, new) for old, new in pairs]


def mmrazors(distiller):
    init_default_scope('mmpretrain')
    return build(
        dict(
            type='mmrazor.SingleTeacherDistill',
            architecture=network(2),
            teacher=network(4),
            data_preprocessor=PREPROCESSOR,
            distiller=distiller,
        )
    )


def test_loss_by_config_alone_in_mmrazors_own_distiller():
    model = mmrazors(
        dict(
            type='mmrazor.ConfigurableDistiller',
            student_recorders=dict(fc=LOGITS, targets=TARGETS),
            teacher_recorders=dict(fc=LOGITS),
            distill_losses=dict(loss_wsl=WSL),
            loss_forward_mappings=dict(loss_wsl=WIRING),
        )
    )
    logged, moved = step(model)
    assert logged['distill.loss_wsl'] > 0 and all(moved)


def test_loss_in_a_byot_distiller():
    # the deepest classifier teaches an exit after the first stage, which a connector makes of its features
    connector = [
        dict(type='torch.nn.AdaptiveAvgPool2d', output_size=1),
        dict(type='torch.nn.Flatten'),
        dict(type='torch.nn.Linear', in_features=2, out_features=10),
    ]
    for cfg in connector:
        name = cfg['type'].rpartition('.')[2]
        if name not in MODELS:
            MODELS.register_module(module=getattr(torch.nn, name), name=name)
        cfg['type'] = name
    stage = dict(type='mmrazor.ModuleOutputs', source='backbone.layer1.0.relu')
    wiring = dict(
        preds_S=dict(recorder='stage', from_student=True, connector='exit'),
        preds_T=dict(recorder='fc', from_student=False),
        gt_labels=dict(recorder='targets', from_student=False, data_idx=1),
    )
    init_default_scope('mmpretrain')
    model = build(
        dict(
            type='mmrazor.SelfDistill',
            architecture=network(2),
            data_preprocessor=PREPROCESSOR,
            distiller=dict(
                type='mmrazor.BYOTDistiller',
                student_recorders=dict(stage=stage),
                teacher_recorders=dict(fc=LOGITS, targets=TARGETS),
                connectors=dict(exit=connector),
                distill_losses=dict(loss_wsl=WSL),
                loss_forward_mappings=dict(loss_wsl=wiring),
            ),
        )
    )
    logged, moved = step(model)
    assert logged['distill.loss_wsl'] > 0 and all(moved)
    assert model.distiller.connectors['exit'][2].weight.grad.abs().sum() > 0


def test_loss_beside_a_feature_loss_with_a_connector():
    features = dict(type='ModuleOutputs', source='backbone.layer3.0.bn2')
    distiller = dict(
        type='mmwsl.WSLDistiller',
        student_recorders=dict(features=features),
        teacher_recorders=dict(features=features),
        connectors=dict(widen=dict(type='ConvModuleConnector', in_channel=8, out_channel=16, norm_cfg=dict(type='BN'))),
        distill_losses=dict(loss_wsl=WSL, loss_features=dict(type='L2Loss', loss_weight=0.5)),
        loss_forward_mappings=dict(
            loss_features=dict(
                s_feature=dict(recorder='features', from_student=True, connector='widen'),
                t_feature=dict(recorder='features', from_student=False),
            )
        ),
    )
    model = build(distillation(distiller=distiller))
    logged, moved = step(model)
    assert logged['distill.loss_wsl'] > 0 and logged['distill.loss_features'] > 0 and all(moved)
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.distiller.connectors.parameters())


def test_default_is_the_paper_on_imagenet():
    loss = build(distillation()).distiller.distill_losses['loss_wsl']
    assert isinstance(loss, WSLLoss) and (loss.tau, loss.loss_weight) == (2.0, 2.5)


def test_another_logit_loss_is_wired_by_the_names_of_its_arguments():
    kd = dict(loss_kd=dict(type='KLDivergence', tau=4.0))
    model = build(distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=kd)))
    model.student.eval()
    data = batch()
    inputs = model.data_preprocessor(data, True)['inputs']
    expected = KLDivergence(tau=4.0)(model.student(inputs), model.teacher(inputs))
    torch.testing.assert_close(losses(model, data)['distill.loss_kd'], expected)


def test_mixed_targets_are_those_that_the_student_sees():
    mixed = dict(PREPROCESSOR, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8)]))
    model = build(distillation(data_preprocessor=mixed))
    logged, moved = step(model)
    targets = model.distiller.student_recorders.get_recorder('hard_loss').get_record_data(0, 1)
    assert targets.shape == (6, 10) and (targets.max(1).values < 1).any()
    assert logged['distill.loss_wsl'] > 0 and all(moved)
    assert 'distill.regularization_share' not in logged  # it is defined by one true class


def test_label_smoothing_is_the_students_alone():
    student = network(2)
    student['head']['loss'] = dict(type='LabelSmoothLoss', label_smooth_val=0.1, num_classes=10)
    logged, moved = step(build(distillation(architecture=student)))
    assert logged['distill.loss_wsl'] > 0 and all(moved)


@pytest.mark.parametrize('who', ['teacher', 'architecture'])
def test_network_without_a_head_is_recorded_as_a_whole(who):
    timm = dict(type='mmpretrain.TimmClassifier', model_name='test_resnet', in_chans=1, num_classes=10)
    model = build(distillation(**{who: timm}))
    model.student.eval()
    data = batch()
    prepared = model.data_preprocessor(data, True)
    preds_S, preds_T = (network(prepared['inputs']) for network in (model.student, model.teacher))
    labels = torch.cat([sample.gt_label for sample in prepared['data_samples']])
    torch.testing.assert_close(losses(model, data)['distill.loss_wsl'], WSLLoss()(preds_S, preds_T, labels))


def head(name, **kwargs):
    return {**network(2), 'head': dict(type=name, num_classes=10, in_channels=8, **kwargs)}


@pytest.mark.parametrize(
    'student, reason',
    [
        (head('ArcFaceClsHead'), 'ArcFaceClsHead, and it moves the true class.s logit by a margin'),
        ({**network(2), 'head': dict(type='ConformerHead', num_classes=10, in_channels=[8, 8])}, 'two classifiers'),
        (head('EfficientFormerClsHead'), 'two classifiers'),
        (
            {
                **network(2),
                'head': dict(
                    type='MultiTaskHead',
                    task_heads=dict(digit=dict(type='LinearClsHead', num_classes=10)),
                    in_channels=8,
                ),
            },
            'a head for each task',
        ),
    ],
    ids=['margin', 'two outputs', 'averaged', 'masked'],
)
def test_head_whose_loss_does_not_see_its_prediction_is_refused(student, reason):
    with pytest.raises(ValueError, match=f'{reason}.*Use another head'):
        build(distillation(architecture=student))


def test_recorder_of_ones_own_serves_any_head():
    recorders = dict(hard_loss=dict(type='ModuleInputs', source='head.loss_module'))
    build(
        distillation(
            architecture=head('ArcFaceClsHead'), distiller=dict(type='mmwsl.WSLDistiller', student_recorders=recorders)
        )
    )


@pytest.mark.parametrize(
    'loss', [dict(type='DISTLoss', tau=2.0), dict(type='WSLD', tau=2.0, num_classes=10)], ids=lambda loss: loss['type']
)
def test_the_fields_other_names_for_logits_are_known(loss):
    model = build(distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_other=loss))))
    logged, moved = step(model)
    assert logged['distill.loss_other'] > 0 and all(moved)


def test_argument_without_a_record_is_refused():
    with pytest.raises(ValueError, match="loss_l2: nothing is recorded for the argument 's_feature' of L2Loss. Add "):
        build(distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_l2=dict(type='L2Loss')))))


def test_loss_that_mmengine_would_not_sum_is_refused():
    with pytest.raises(ValueError, match="'wsl', which would be logged but not trained on.*Rename it to 'loss_wsl'"):
        build(distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(wsl=WSL))))


def test_statistics_are_in_no_sum_whatever_their_recorder_is_called():
    recorders = dict(aux_loss=dict(type='ModuleInputs', source='head.loss_module'))
    wiring = {
        name: {**mapping, 'recorder': 'aux_loss'} if mapping['from_student'] else mapping
        for name, mapping in MAPPINGS.items()
        if name in ('preds_S', 'preds_T', 'gt_labels')
    }
    model = build(
        distillation(
            distiller=dict(
                type='mmwsl.WSLDistiller', student_recorders=recorders, loss_forward_mappings=dict(loss_wsl=wiring)
            )
        )
    )
    results = losses(model, batch())
    total, logged = model.parse_losses(results)
    assert 'distill.aux_logits.wsl_weight' in logged
    torch.testing.assert_close(total, results['student.loss'] + results['distill.loss_wsl'])


def test_wiring_that_names_no_recorder_is_refused():
    mappings = dict(loss_wsl=dict(WIRING, preds_T=dict(recorder='nowhere', from_student=False)))
    with pytest.raises(AssertionError, match='"nowhere" must be in'):
        build(
            distillation(
                distiller=dict(
                    type='mmwsl.WSLDistiller',
                    student_recorders=dict(fc=LOGITS, targets=TARGETS),
                    loss_forward_mappings=mappings,
                )
            )
        )


@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_a_recorder_without_its_module_is_explained(who):
    recorders = {f'{who}_recorders': dict(features=dict(type='mmrazor.ModuleOutputs', source='backbone.layer9'))}
    with pytest.raises(
        ValueError,
        match=f"of the {who} finds nothing.*with \\['data_preprocessor', 'backbone', 'neck', "
        f"'head'\\]. Name one of its modules in {who}_recorders",
    ):
        build(distillation(distiller=dict(type='mmwsl.WSLDistiller', **recorders)))
