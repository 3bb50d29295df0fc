"""Pairs of a loss and a weighting in a distiller: which are defined, and that each trains from a config alone."""

import copy
import functools
import math
import pickle

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmrazor.registry import MODELS

from mmwsl.models import WSLDistiller
from mmwsl.models.losses import SampleLoss, WeightedLoss
from mmwsl.models.weightings import SampleWeighting
from tests.test_models.test_losses.references import (
    LOSSES,
    PAIRS,
    TEACHER_LOSSES,
    WEIGHTINGS,
    decisions_of,
    teacher_losses,
)
from tests.tiny import PREPROCESSOR, batch, build, digits_config, distillation, load_tool, losses, network

pairs = load_tool('pairs')

LOGITS = dict(type='mmrazor.ModuleOutputs', source='head.fc')
TARGETS = dict(type='mmrazor.ModuleInputs', source='head.loss_module')
SAMPLES = dict(type='mmrazor.ModuleInputs', source='')
WIRING = dict(
    preds_S=dict(recorder='fc', from_student=True),
    preds_T=dict(recorder='fc', from_student=False),
    gt_labels=dict(recorder='targets', from_student=True, data_idx=1),
    data_samples=dict(recorder='samples', from_student=True, data_idx=1),
)
ELSEWHERE = dict(
    preds_T=dict(recorder='logits', from_student=False),
    gt_labels=dict(recorder='hard_loss', from_student=True, data_idx=1),
)
MIXUP = dict(PREPROCESSOR, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8)]))
# standardised logits around one loss stand for all
TRAINED = [(loss, weighting) for loss, weighting in PAIRS if loss == 'Standardized DKD' or 'Stand' not in loss]
SHUFFLED = dict(type='ShuffledWeighting')


@pytest.fixture(autouse=True)
def _file(monkeypatch):
    teacher_losses(monkeypatch)


def weighted(loss, weighting, **kwargs):
    return dict(type='mmwsl.WeightedLoss', loss=loss, weighting=weighting, **kwargs)


def of_sigmoids(channels):
    cfg = network(channels)
    cfg['head'] = dict(type='MultiLabelLinearClsHead', num_classes=10, in_channels=4 * channels)
    return cfg


@functools.cache
def networks(algorithm, per_class):
    """A student and a teacher, built once, that learn from the distiller alone."""
    make = of_sigmoids if per_class else network
    fitting = dict(
        type='mmwsl.WSLDistiller',
        distill_losses=dict(loss_own=weighted(dict(type='BernoulliKD' if per_class else 'SoftCrossEntropy'), None)),
    )
    model = build(
        distillation(
            type=algorithm, architecture=make(2), teacher=make(4), distiller=fitting, calculate_student_loss=False
        )
    )
    for net in (model.student, model.teacher):  # nearly equal logits would be a question of rounding
        net.head.fc.weight.data.mul_(50)
    return model


def images(per_class=False):
    data = batch()
    for place, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(sample_idx=(7 * place + 3) % len(TEACHER_LOSSES)))
        if per_class:
            sample.set_gt_label(sorted({place, 9 - place, 8}))
    return data


def distilled(algorithm, distiller, per_class=False):
    """The networks under another distiller, from its config."""
    model = networks(algorithm, per_class)
    model.distiller = MODELS.build(distiller)
    model.distiller.prepare_from_student(model.student)
    model.distiller.prepare_from_teacher(model.teacher)
    return model


def step(model, data):
    """One step; returns what is logged, and the student's parameters that did not move."""
    model.train()
    before = copy.deepcopy(model.student.state_dict())
    total, logged = model.parse_losses(losses(model, data))
    model.zero_grad()
    total.backward()
    torch.optim.SGD(model.student.parameters(), lr=0.1).step()
    still = [name for name, parameter in model.student.named_parameters() if torch.equal(parameter, before[name])]
    model.student.load_state_dict(before)
    return logged, still


def reference(loss, weighting, preds_S, preds_T, target):
    """The loss of a batch in plain Python."""
    found = decisions_of(preds_S, preds_T, target, loss.per_class)
    weights = weighting.of_batch(found, loss.tau)
    total = math.fsum(w * loss.of_target(d) for w, d in zip(weights, found, strict=True)) / len(preds_S)
    return total + (loss.whole(found) if loss.whole else 0.0)


# ---- the table


def test_page_is_what_the_registry_gives():
    assert pairs.PAGE.read_text() == pairs.page(), 'docs/pairs.md is out of step: run tools/pairs.py'


def test_every_part_has_a_reference():
    for kind, listed, alone in ((SampleLoss, LOSSES, set()), (SampleWeighting, WEIGHTINGS, {'ShuffledWeighting'})):
        registered = {config['type'] for config in pairs.parts(kind).values()}
        assert registered == {part.config['type'] for part in listed.values()} | alone


@pytest.mark.parametrize(
    ('loss', 'weighting'),
    [(loss, weighting) for loss in LOSSES for weighting in WEIGHTINGS if (loss, weighting) not in PAIRS],
)
def test_a_pair_that_is_not_defined_is_refused_by_name_with_the_way_out(loss, weighting):
    loss, weighting = LOSSES[loss].config, WEIGHTINGS[weighting].config
    names = f'^{loss["type"]} under {weighting["type"]} is not defined'
    with pytest.raises(ValueError, match=f'{names}: .* (Use|Compute) ') as error:
        WeightedLoss(loss, weighting)
    with pytest.raises(ValueError, match='is not defined') as built:
        WSLDistiller(dict(loss_own=weighted(loss, weighting)))
    assert str(error.value) in str(built.value)


@pytest.mark.parametrize(
    'weighting', [name for name, weighting in WEIGHTINGS.items() if name != 'Uniform' and not weighting.per_class]
)
def test_a_term_of_the_whole_has_nothing_to_weight(weighting):
    for loss in (dict(type='DIST', beta=0), dict(type='Standardized', loss=dict(type='DIST', beta=0))):
        names = f'^{loss["type"]} under {WEIGHTINGS[weighting].config["type"]} is not defined'
        with pytest.raises(ValueError, match=f'{names}: .* Remove the weighting'):
            WeightedLoss(loss, WEIGHTINGS[weighting].config)


# ---- each pair trains


@pytest.mark.parametrize(('loss', 'weighting'), TRAINED)
def test_each_pair_trains_under_both_distillers_as_its_formula_says(loss, weighting):
    loss, weighting = LOSSES[loss], WEIGHTINGS[weighting]
    config, data = weighted(loss.config, weighting.config, loss_weight=2.0), images(loss.per_class)
    ours = dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_own=config))
    mmrazors = dict(
        type='mmrazor.ConfigurableDistiller',
        student_recorders=dict(fc=LOGITS, targets=TARGETS, samples=SAMPLES),
        teacher_recorders=dict(fc=LOGITS),
        distill_losses=dict(loss_own=config),
        loss_forward_mappings=dict(loss_own=WIRING),
    )
    for algorithm, distiller, targets, logits in (
        ('mmwsl.WSLDistill', ours, 'hard_loss', 'logits'),
        ('mmrazor.SingleTeacherDistill', mmrazors, 'targets', 'fc'),
    ):
        model = distilled(algorithm, distiller, loss.per_class)
        logged, still = step(model, data)
        assert not still
        assert all(math.isfinite(value) for value in logged.values())
        ((preds_S, target),) = model.distiller.student_recorders.get_recorder(targets).data_buffer
        (preds_T,) = model.distiller.teacher_recorders.get_recorder(logits).data_buffer
        expected = 2.0 * reference(loss, weighting, preds_S, preds_T, target)
        assert logged['distill.loss_own'].item() == pytest.approx(expected, rel=1e-4)


def test_shuffled_weights_train_under_both_kinds_of_head():
    for per_class, loss in ((False, 'TTM'), (True, 'BernoulliKD')):
        distiller = dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_own=weighted(dict(type=loss), SHUFFLED)))
        logged, still = step(distilled('mmwsl.WSLDistill', distiller, per_class), images(per_class))
        assert not still and math.isfinite(logged['distill.loss_own'])


# ---- what does not go with a head or with mixed labels is refused


def wired(*configs, architecture=None, preprocessor=PREPROCESSOR, **kwargs):
    """Build the networks' targets check: a distiller under a student of some kind."""
    distiller = MODELS.build(
        dict(
            type='mmwsl.WSLDistiller',
            distill_losses={f'loss_{number}': config for number, config in enumerate(configs)},
            **kwargs,
        )
    )
    init_default_scope('mmpretrain')
    student, data_preprocessor = MODELS.build(architecture or network(2)), MODELS.build(preprocessor)
    distiller.check_targets(student, data_preprocessor)


def with_head(**head):
    cfg = network(2)
    cfg['head'] = {**cfg['head'], **head}
    return cfg


SIGMOIDS = [of_sigmoids(2), with_head(loss=dict(type='CrossEntropyLoss', use_sigmoid=True))]


@pytest.mark.parametrize('name', [name for name, loss in LOSSES.items() if not loss.per_class])
def test_a_softmax_loss_under_a_multi_label_head(name):
    config, (multi_label, one_label) = LOSSES[name].config, SIGMOIDS
    message = f'^loss_0: {config["type"]} is not defined for .*LinearClsHead, a sigmoid head. .*BernoulliKD'
    with pytest.raises(ValueError, match=message):
        wired(weighted(config, None), architecture=multi_label)
    wired(weighted(config, None), architecture=one_label)  # one label, by a binary cross-entropy


@pytest.mark.parametrize('architecture', SIGMOIDS, ids=['multi-label', 'use_sigmoid'])
def test_a_loss_per_class_under_a_head_of_sigmoids(architecture):
    wired(weighted(dict(type='BernoulliKD'), dict(type='DisagreementWeighting')), architecture=architecture)


def test_a_loss_per_class_under_a_softmax():
    with pytest.raises(
        ValueError,
        match="^loss_1: BernoulliKD is not defined for the student's LinearClsHead, a "
        "softmax head. .*loss=dict\\(type='SoftCrossEntropy'\\)",
    ):
        wired(weighted(dict(type='TTM'), None), weighted(dict(type='BernoulliKD'), None))


@pytest.mark.parametrize(
    ('loss', 'weighting', 'needy'),
    [
        ('DKD', 'UniformWeighting', 'DKD'),
        ('NKD', 'UniformWeighting', 'NKD'),
        ('TTM', 'RegularizationWeighting', 'RegularizationWeighting'),
        ('TTM', 'WSL, file', 'WSLWeighting'),
    ],
)
def test_what_needs_one_class_under_mixed_labels(loss, weighting, needy):
    weighting = WEIGHTINGS[weighting].config if weighting in WEIGHTINGS else dict(type=weighting)
    with pytest.raises(
        ValueError,
        match=f'^loss_0: {needy} needs one class for each image, and batch_augments mixes .* Remove batch_augments',
    ):
        wired(weighted(dict(type=loss), weighting), preprocessor=MIXUP)
    wired(weighted(dict(type=loss), weighting))


def test_what_is_defined_for_class_scores_goes_with_mixed_labels():
    wired(
        dict(type='mmwsl.WSLLoss'),
        weighted(dict(type='DIST'), dict(type='EntropyWeighting', student=True)),
        preprocessor=MIXUP,
    )


def test_a_loss_that_is_wired_otherwise_and_a_head_of_ones_own_are_left_to_the_user():
    elsewhere = dict(ELSEWHERE, preds_S=dict(recorder='aux', from_student=True))
    wired(
        weighted(dict(type='BernoulliKD'), None),
        student_recorders=dict(aux=LOGITS),
        loss_forward_mappings=dict(loss_0=elsewhere),
    )
    wired(weighted(dict(type='BernoulliKD'), None), architecture=dict(type='mmwsl.CIFARResNet', depth=8))


@pytest.mark.parametrize(
    ('loss', 'weighting', 'needy'),
    [('DKD', None, 'DKD'), ('TTM', dict(type='RegularizationWeighting'), 'RegularizationWeighting')],
)
def test_mixed_labels_under_mmrazors_distiller_are_refused_at_the_first_batch(loss, weighting, needy):
    wiring = {name: record for name, record in WIRING.items() if name != 'data_samples'}
    model = build(
        distillation(
            type='mmrazor.SingleTeacherDistill',
            data_preprocessor=MIXUP,
            distiller=dict(
                type='mmrazor.ConfigurableDistiller',
                student_recorders=dict(fc=LOGITS, targets=TARGETS),
                teacher_recorders=dict(fc=LOGITS),
                distill_losses=dict(loss_own=weighted(dict(type=loss), weighting)),
                loss_forward_mappings=dict(loss_own=wiring),
            ),
        )
    )
    with pytest.raises(ValueError, match=f'^{needy} needs .*got class scores'):
        losses(model, batch())


# ---- statistics

STATISTICS = {'wsl_weight', 'wsl_weight_p10', 'wsl_weight_p50', 'wsl_weight_p90', 'regularization_share'}


def test_names_of_statistics():
    wsl, entropy = (
        weighted(dict(type='TTM'), dict(type='WSLWeighting')),
        weighted(dict(type='TTM'), dict(type='EntropyWeighting')),
    )
    model = distilled(
        'mmwsl.WSLDistill',
        dict(
            type='mmwsl.WSLDistiller',
            student_recorders=dict(aux_0=LOGITS, aux_loss=LOGITS),
            distill_losses=dict(
                loss_a=wsl, loss_kd=dict(type='mmrazor.KLDivergence'), loss_b=entropy, loss_aux=entropy, loss_aux_2=wsl
            ),
            loss_forward_mappings=dict(
                loss_aux=dict(ELSEWHERE, preds_S=dict(recorder='aux_0', from_student=True)),
                loss_aux_2=dict(ELSEWHERE, preds_S=dict(recorder='aux_loss', from_student=True)),
            ),
        ),
    )
    logged, _ = step(model, images())
    losses_of = {f'distill.{name}' for name in ('loss_a', 'loss_kd', 'loss_b', 'loss_aux', 'loss_aux_2')}
    expected = {
        f'distill.{name}'
        for statistic in STATISTICS
        for name in (statistic, f'{statistic}_3', f'aux_0.{statistic}', f'aux_logits.{statistic}')
    }
    assert set(logged) == {'loss'} | losses_of | expected
    assert logged['loss'].item() == pytest.approx(sum(logged[name].item() for name in losses_of))
    # the same logits at either place: the entropies' mean is that of the third loss, and WSL's of the first
    torch.testing.assert_close(logged['distill.aux_0.wsl_weight'], logged['distill.wsl_weight_3'])
    torch.testing.assert_close(logged['distill.aux_logits.wsl_weight'], logged['distill.wsl_weight'])
    assert logged['distill.wsl_weight'] != logged['distill.wsl_weight_3']


def test_second_loss_at_the_same_head_counts_from_two():
    config = weighted(dict(type='TTM'), None)
    model = distilled(
        'mmwsl.WSLDistill', dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_a=config, loss_b=config))
    )
    logged, _ = step(model, images())
    assert {'distill.wsl_weight', 'distill.wsl_weight_2', 'distill.regularization_share_2'} < set(logged)


def test_copies_of_a_distiller_carry_no_batch():
    model = distilled(
        'mmwsl.WSLDistill',
        dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_own=weighted(dict(type='DKD'), SHUFFLED))),
    )
    step(model, images())
    assert model.distiller.calls['loss_own'].weight.shape == (6,)
    twin = copy.deepcopy(model)
    for distiller in (twin.distiller, pickle.loads(pickle.dumps(model.distiller))):
        assert distiller.calls == {} and distiller.distill_losses['loss_own'].last_call is None
        ((preds_S, target),) = distiller.student_recorders.get_recorder('hard_loss').data_buffer
        assert preds_S.shape == (6, 10) and preds_S.is_leaf and target.shape == (6,)
    torch.manual_seed(3)
    expected, _ = step(model, images())
    torch.manual_seed(3)
    logged, still = step(twin, images())
    assert not still
    torch.testing.assert_close(logged, expected)


# ---- a run that is resumed


def test_a_resumed_run_keeps_the_first_epochs_and_the_running_means(tmp_path, monkeypatch):
    shares, warmup = [], WeightedLoss._warmup
    monkeypatch.setattr(WeightedLoss, '_warmup', lambda loss: shares.append(warmup(loss)) or shares[-1])
    config = weighted(dict(type='TTM'), dict(type='WSLWeighting', scale_free=True), warmup_epochs=3)
    model = distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_own=config)))

    def run(work_dir, epochs, **kwargs):
        shares.clear()
        cfg = digits_config(
            work_dir,
            model,
            epochs,
            custom_hooks=[dict(type='mmwsl.EpochSeedHook')],
            train_dataloader=dict(batch_size=300),
            **kwargs,
        )  # 2 steps an epoch
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = cfg.param_scheduler = None
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner.model.distiller.distill_losses['loss_own'].sample_weighting.running, list(shares)

    expected = [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]
    unbroken, found = run(tmp_path / 'unbroken', 4)
    assert found == expected
    _, found = run(tmp_path / 'resumed', 2)
    assert found == expected[:4]
    resumed, found = run(tmp_path / 'resumed', 4, resume=True)
    assert found == expected[4:]
    assert unbroken[2].item() == pytest.approx(1 - 0.99**8)
    assert torch.equal(resumed, unbroken)
