"""Every loss, and every pair of a loss and a weighting, against tests/test_models/test_losses/references.py."""

import math

import pytest
import torch
from mmengine.logging import MessageHub

from mmwsl.models.losses import SampleLoss, WeightedLoss, WSLLoss
from mmwsl.models.weightings import SampleWeighting
from tests.test_models.test_losses.references import (
    LOSSES,
    PAIRS,
    SHAPES,
    TOLERANCES,
    WEIGHTINGS,
    Decision,
    count,
    decisions,
    inputs,
    loss_gradient,
    loss_values,
    of_targets,
    samples,
    teacher_losses,
    weight_values,
    whole_gradient,
)

WHOLE = [name for name, loss in LOSSES.items() if loss.whole]
SMALL = [shape for shape in SHAPES if math.prod(shape) < 50]
OF_TARGETS = [name for name, loss in LOSSES.items() if not loss.whole]


@pytest.fixture(autouse=True)
def _file(monkeypatch):
    teacher_losses(monkeypatch)


def assert_near(actual, expected, **tolerance):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64), **tolerance)


def kinds_of(*parts):
    """Targets that all parts are defined for."""
    scores = [] if any(part.needs_classes for part in parts) else ['scores']
    labels = ['labels'] if any(part.per_class for part in parts) else []
    return ['indices', 'some ignored', *scores, *labels]


def cases(names):
    return [(name, kind) for name in names for kind in kinds_of(LOSSES[name])]


# ---- each loss alone


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize(('name', 'kind'), cases(OF_TARGETS))
def test_value_and_gradient_of_each_target(name, kind, shape):
    loss = LOSSES[name]
    values, slopes = loss_values(name, shape, kind), loss_gradient(name, shape, kind)
    expected = of_targets(values, shape, loss.per_class)
    expected = expected.sum(1) if loss.per_class else expected
    upstream = torch.arange(expected.numel(), dtype=torch.float64).reshape(expected.shape) / 4 - 2
    for dtype, (of_values, of_gradients) in TOLERANCES.items():
        preds_S, preds_T, target = inputs(shape, kind, dtype)
        module = WeightedLoss(loss.config, loss_weight=2.5, reduction='none')
        result = module(preds_S, preds_T, target)
        assert result.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert_near(result, 2.5 * expected, **of_values)
        result.backward(upstream.to(result.dtype))
        assert preds_S.grad.dtype == dtype
        assert_near(preds_S.grad, 2.5 * upstream.unsqueeze(1) * slopes, **of_gradients)


@pytest.mark.parametrize('shape', SMALL, ids=str)
@pytest.mark.parametrize(('name', 'kind'), cases(WHOLE))
def test_value_and_gradient_of_a_loss_with_a_term_of_the_whole(name, kind, shape):
    loss = LOSSES[name]
    kept = count(shape, kind)
    expected = math.fsum(loss_values(name, shape, kind)) / kept + loss.whole(decisions(shape, kind, False))
    slopes = loss_gradient(name, shape, kind) / kept + whole_gradient(name, shape, kind)
    for dtype, (of_values, of_gradients) in TOLERANCES.items():
        preds_S, preds_T, target = inputs(shape, kind, dtype)
        result = WeightedLoss(loss.config, loss_weight=2.5)(preds_S, preds_T, target)
        assert_near(result, 2.5 * expected, **of_values)
        (64 * result).backward()  # as a loss scale does
        # the sum of two terms, each rounded to the logits' type
        rounded = of_gradients['rtol'] * max(slopes.abs().flatten().tolist(), default=0.0)
        assert_near(preds_S.grad / 160, slopes, rtol=of_gradients['rtol'], atol=max(rounded, of_gradients['atol']))


@pytest.mark.parametrize('name', OF_TARGETS)
@pytest.mark.parametrize('shape', [(5, 7), (2, 5, 3), (0, 5)], ids=str)
def test_reductions(name, shape):
    loss, kind = LOSSES[name], 'some ignored'
    total, slopes = math.fsum(loss_values(name, shape, kind)), loss_gradient(name, shape, kind)
    for reduction, divisor in (('sum', 1), ('mean', count(shape, kind))):
        preds_S, preds_T, target = inputs(shape, kind)
        result = WeightedLoss(loss.config, reduction=reduction)(preds_S, preds_T, target)
        assert_near(result, total / divisor)
        result.backward()
        assert_near(preds_S.grad, slopes / divisor, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize('name', LOSSES)
def test_no_target_kept_gives_zero(name):
    for shape in ((4, 5), (0, 5)):
        preds_S, preds_T, target = inputs(shape)
        loss = WeightedLoss(LOSSES[name].config)
        result = loss(preds_S, preds_T, torch.full_like(target, -100))
        result.backward()
        assert result == 0 and not preds_S.grad.any()
        assert all(value == 0 for value in loss.statistics.values())


# Row 0: the student is sure of the wrong class, the teacher of the right one. Row 1: both of the right one. Row 2: the
# teacher is sure of the wrong one. 10,240 is a number of every type.
EXTREME = 10240.0
EXTREME_S = torch.tensor([[EXTREME, -EXTREME, 0.0], [-EXTREME, EXTREME, 0.0], [0.0, EXTREME, -EXTREME]])
EXTREME_T = torch.tensor([[-EXTREME, EXTREME, 0.0], [-EXTREME, EXTREME, 0.0], [EXTREME, -EXTREME, 0.0]])


@pytest.mark.parametrize('name', OF_TARGETS)
def test_logits_of_ten_thousand(name):
    loss = LOSSES[name]
    rows = zip(EXTREME_S.tolist(), EXTREME_T.tolist(), strict=True)
    if loss.per_class:
        expected = [
            sum(
                loss.of_target(Decision([0, s], [0, t], [c != 1, c == 1]))
                for c, (s, t) in enumerate(zip(*row, strict=True))
            )
            for row in rows
        ]
    else:
        expected = [loss.of_target(Decision(s, t, [0, 1, 0])) for s, t in rows]
    for dtype in TOLERANCES:
        preds_S = EXTREME_S.to(dtype, copy=True).requires_grad_()
        result = WeightedLoss(loss.config, reduction='none')(preds_S, EXTREME_T.to(dtype), torch.tensor([1, 1, 1]))
        assert_near(result, expected, rtol=1e-6, atol=1e-5)
        result.sum().backward()
        assert preds_S.grad.isfinite().all()


@pytest.mark.parametrize('name', LOSSES)
def test_gradient_of_torch_with_the_weight_held_fixed(name):
    preds_S, preds_T, target = inputs((2, 4, 3), 'some ignored')
    loss = WeightedLoss(LOSSES[name].config, dict(type='WSLWeighting'))
    loss(preds_S, preds_T, target)
    weight = loss.last_call.weight

    def held_fixed(preds):
        batch = loss.sample_loss.batch(preds, preds_T, target, -100)
        total = (loss.sample_loss.of_batch(preds, batch) * weight * batch.kept).sum()
        whole = loss.sample_loss.of_the_whole(preds, batch)
        return total if whole is None else total + whole

    assert torch.autograd.gradcheck(held_fixed, preds_S)


@pytest.mark.parametrize('name', LOSSES)
def test_the_teacher_gets_no_gradient(name):
    preds_S, preds_T, target = inputs()
    preds_T.requires_grad_()
    WeightedLoss(LOSSES[name].config, dict(type='WSLWeighting'))(preds_S, preds_T, target).backward()
    assert preds_T.grad is None and preds_S.grad.any()


# ---- each pair


@pytest.mark.parametrize(('name', 'weighting'), PAIRS)
def test_value_and_gradient_of_each_pair(name, weighting):
    shape, loss, weight = (5, 7), LOSSES[name], WEIGHTINGS[weighting]
    for kind in kinds_of(loss, weight):
        preds_S, preds_T, target = inputs(shape, kind)
        weights = of_targets(weight_values(weighting, shape, kind, loss.per_class, loss.tau), shape, loss.per_class)
        values = of_targets(loss_values(name, shape, kind), shape, loss.per_class)
        expected = (weights * values).sum() / count(shape, kind)
        slopes = (weights if loss.per_class else weights.unsqueeze(1)) * loss_gradient(name, shape, kind)
        slopes = slopes / count(shape, kind)
        if loss.whole:
            expected = expected + loss.whole(decisions(shape, kind, False))
            slopes = slopes + whole_gradient(name, shape, kind)
        result = WeightedLoss(loss.config, weight.config)(preds_S, preds_T, target, data_samples=samples(shape[0]))
        assert_near(result, expected, rtol=1e-9, atol=1e-11)
        result.backward()
        assert_near(preds_S.grad, slopes, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ('name', 'weighting'),
    [('SoftCrossEntropy', 'WSL'), ('DKD', 'Entropy, student'), ('TTM', 'WTTM'), ('BernoulliKD', 'Disagreement')],
)
def test_a_further_weight_and_avg_factor(name, weighting):
    shape, kind, loss = (2, 5, 3), 'some ignored', LOSSES[name]
    weights = of_targets(weight_values(weighting, shape, kind, loss.per_class, loss.tau), shape, loss.per_class)
    values = weights * of_targets(loss_values(name, shape, kind), shape, loss.per_class)
    further = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    expected = ((values.sum(1) if loss.per_class else values) * further).sum() / 3.5
    module = WeightedLoss(loss.config, WEIGHTINGS[weighting].config)
    assert_near(module(*inputs(shape, kind), weight=further, avg_factor=3.5), expected)


@pytest.mark.parametrize('name', ['TTM', 'Standardized', 'BernoulliKD'])
def test_a_temperature_may_change_between_batches(name):
    loss = WeightedLoss(LOSSES[name].config)
    assert loss.tau == LOSSES[name].tau
    expected = WeightedLoss(LOSSES[name].config)
    expected.sample_loss = type(loss.sample_loss)(dict(type='SoftCrossEntropy', tau=7.0) if 'Stand' in name else 7.0)
    loss.tau = 7.0
    assert torch.equal(loss(*inputs()), expected(*inputs()))


# ---- against others


@pytest.mark.parametrize('kind', ['indices', 'some ignored', 'labels', 'scores'])
@pytest.mark.parametrize('shape', [(5, 7), (2, 5, 3)], ids=str)
def test_each_class_of_a_head_of_sigmoids_is_weighted_soft_labels_of_two_classes(kind, shape):
    preds_S, preds_T, target = inputs(shape, kind)
    result = WeightedLoss(dict(type='BernoulliKD', tau=4.0), dict(type='WSLWeighting'), loss_weight=2.25)(
        preds_S, preds_T, target
    )
    result.backward()
    twin, expected = preds_S.detach().clone().requires_grad_(), 0.0
    wsl = WSLLoss(4.0, 2.25)
    for c in range(shape[1]):
        two_S, two_T = (torch.stack([torch.zeros_like(preds[:, c]), preds[:, c]], 1) for preds in (twin, preds_T))
        if kind in ('indices', 'some ignored'):
            outcome = torch.where(target == -100, -100, (target == c).long())
        elif kind == 'labels':
            outcome = target[:, c].long()
        else:
            outcome = torch.stack([1 - target[:, c], target[:, c]], 1)
        expected = expected + wsl(two_S, two_T, outcome)
    expected.backward()
    assert_near(result, expected.detach())
    assert_near(preds_S.grad, twin.grad)


@pytest.mark.parametrize('tau', [1.0, 4.0])
@pytest.mark.parametrize('shape', [(5, 7), (16, 100)], ids=str)
def test_mmrazors_losses(shape, tau):
    from mmrazor.models.losses import DISTLoss, DKDLoss, KLDivergence  # after mmwsl, which readies the stack

    preds_S, preds_T, target = inputs(shape)
    pairs = [
        (dict(type='DKD', tau=tau, alpha=1.5, beta=6.0), DKDLoss(tau, 1.5, 6.0)(preds_S, preds_T, target)),
        (dict(type='DIST', tau=tau, beta=2.0, gamma=0.5), DISTLoss(2.0, 0.5, tau)(preds_S, preds_T)),
        (dict(type='SoftCrossEntropy', tau=tau), KLDivergence(tau)(preds_S, preds_T)),
    ]
    for config, theirs in pairs:
        ours = WeightedLoss(config)(preds_S, preds_T, target)
        if config['type'] == 'SoftCrossEntropy':  # a cross-entropy is larger by the teacher's entropy
            p_t = (preds_T / tau).softmax(1)
            ours = ours + tau**2 * (p_t * p_t.log()).sum(1).mean()
        assert_near(ours, theirs.detach(), rtol=1e-6, atol=1e-9)
        assert_near(
            *(torch.autograd.grad(loss, preds_S, retain_graph=True)[0] for loss in (ours, theirs)), rtol=1e-6, atol=1e-9
        )


# ---- worked by hand


def test_dkd_of_two_halves():
    # tau 1, y = 0. Teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2):
    # TCKD = 1/2 ln 2 + 1/2 ln (1/2 / (3/4)) = 1/2 ln (4/3), NCKD = 1/2 ln (3/2) + 1/2 ln (3/4) = 1/2 ln (9/8)
    student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    loss = WeightedLoss(dict(type='DKD', tau=1.0, alpha=1.0, beta=8.0))
    assert loss(student, teacher, torch.tensor([0])).item() == pytest.approx(
        math.log(4 / 3) / 2 + 8 * math.log(9 / 8) / 2
    )


def test_nkd_of_two_halves():
    # -1/2 ln 1/4 - 1.5 (1/2 ln 1/3 + 1/2 ln 2/3)
    student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert WeightedLoss(dict(type='NKD'))(student, teacher, torch.tensor([0])).item() == pytest.approx(
        math.log(4) / 2 + 0.75 * math.log(9 / 2)
    )


def test_a_batch_of_one_has_no_relations_between_targets():
    # as in DIST's own code: the deviations are 0, and so is the correlation
    loss = WeightedLoss(dict(type='DIST', tau=2.0, beta=0.0))
    preds_S, preds_T, target = inputs((1, 5))
    result = loss(preds_S, preds_T, target)
    result.backward()
    assert result == 4 and not preds_S.grad.any()


def test_standardised_logits_of_equal_size_have_no_gradient():
    preds_S = torch.ones(1, 3, requires_grad=True)
    result = WeightedLoss(dict(type='Standardized'))(preds_S, torch.ones(1, 3), torch.tensor([1]))
    result.backward()
    assert result.item() == pytest.approx(4 * math.log(3)) and not preds_S.grad.any()


# ---- what is refused

NEED_SEVERAL = ['DKD', 'NKD', 'DIST', 'DIST, between classes', *(name for name in LOSSES if 'Standardized' in name)]


@pytest.mark.parametrize('name', NEED_SEVERAL)
def test_relations_among_one_class(name):
    loss, one = WeightedLoss(LOSSES[name].config), torch.zeros(3, 1)
    with pytest.raises(
        ValueError, match=r"at least 2 classes, got 1. For a single logit.* loss=dict\(type='BernoulliKD'\)"
    ):
        loss(one, one, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize('name', [name for name, loss in LOSSES.items() if loss.needs_classes])
def test_class_scores_of_a_loss_that_needs_classes(name):
    config = LOSSES[name].config
    with pytest.raises(ValueError, match=f'^{config["type"]} needs one class for each target, got class scores'):
        WeightedLoss(config)(*inputs(kind='scores'))


@pytest.mark.parametrize('name', [name for name, loss in LOSSES.items() if not loss.per_class])
def test_several_labels_of_one_target(name):
    with pytest.raises(ValueError, match='class scores should be at least 0 and sum to 1'):
        WeightedLoss(LOSSES[name].config)(*inputs(kind='labels'))


@pytest.mark.parametrize('score', [-1.0, 2.0, math.nan])
def test_label_scores_that_are_neither_right_nor_wrong(score):
    preds_S, preds_T, target = inputs(kind='labels')
    target = target.index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(score, dtype=target.dtype))
    with pytest.raises(ValueError, match=r'^label scores should lie in \[0, 1\], got .*name each label of an image'):
        WeightedLoss(dict(type='BernoulliKD'))(preds_S, preds_T, target)


@pytest.mark.parametrize('name', WHOLE)
def test_a_term_of_the_whole_is_a_mean(name):
    message = "a term of the batch as a whole is a mean, got reduction='(sum|none)'.*gamma=0 in DIST"
    with pytest.raises(ValueError, match=message):
        WeightedLoss(LOSSES[name].config, reduction='sum')
    with pytest.raises(ValueError, match=message):
        WeightedLoss(LOSSES[name].config)(*inputs(), reduction_override='none')


@pytest.mark.parametrize('name', ['SoftCrossEntropy', 'DKD', 'NKD', 'DIST', 'TTM', 'BernoulliKD'])
def test_a_temperature_that_is_not_positive(name):
    with pytest.raises(ValueError, match='^tau should be a positive number, got 0$'):
        WeightedLoss(dict(type=name, tau=0))


def test_sigmoids_have_no_logits_to_be_standardised_among():
    with pytest.raises(ValueError, match='BernoulliKD is for sigmoid heads: use it without Standardized'):
        WeightedLoss(dict(type='Standardized', loss=dict(type='BernoulliKD')))


@pytest.mark.parametrize(
    ('config', 'got'),
    [(dict(type='mmrazor.KLDivergence'), 'KLDivergence'), ('DKD', 'str'), (dict(type='WSLWeighting'), 'WSLWeighting')],
)
def test_a_loss_of_another_kind(config, got):
    with pytest.raises(TypeError, match=f'^loss should be the config of a SampleLoss.*got {got}. docs/pairs.md'):
        WeightedLoss(config)
    with pytest.raises(TypeError, match='^loss should be'):
        WeightedLoss(dict(type='Standardized', loss=config))


@pytest.mark.parametrize(('config', 'got'), [(dict(type='DKD'), 'DKD'), ('wsl', 'str')])
def test_a_weighting_of_another_kind(config, got):
    for weighting in (config, dict(type='MeanWeighting', of=config), dict(type='ProductWeighting', factors=[config])):
        with pytest.raises(TypeError, match=f'^weighting should be the config of a SampleWeighting.*got {got}. docs'):
            WeightedLoss(dict(type='TTM'), weighting)


class Shaped(SampleWeighting):
    """A weighting of one's own, of some shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, batch):
        return torch.ones(self.shape)


@pytest.mark.parametrize(
    ('name', 'shape', 'expected'),
    [
        ('TTM', (5, 1), r'\(5,\)'),
        ('TTM', (), r'\(5,\)'),
        ('TTM', (5, 5), r'\(5,\)'),
        ('BernoulliKD', (5,), r'\(5, 5\)'),
    ],
)
def test_weights_that_would_broadcast(name, shape, expected):
    with pytest.raises(ValueError, match=f'^Shaped should return weights of shape {expected}, one for each loss, got'):
        WeightedLoss(dict(type=name), Shaped(*shape))(*inputs((5, 5)))


def test_losses_of_another_shape():
    class Total(SampleLoss):
        def forward(self, preds_S, preds_T, target):
            return (preds_S - preds_T).square().sum()

    with pytest.raises(ValueError, match=r'^Total should return losses of shape \(5,\) for logits of shape \(5, 7\)'):
        WeightedLoss(Total())(*inputs())


# ---- the first epochs


def test_the_loss_grows_over_the_first_epochs(monkeypatch):
    hub = MessageHub.get_instance('test_the_loss_grows_over_the_first_epochs')
    monkeypatch.setattr(MessageHub, 'get_current_instance', lambda: hub)
    config = LOSSES['DIST'].config  # its term of the whole grows, too
    loss, expected = WeightedLoss(config, warmup_epochs=4), WeightedLoss(config)(*inputs())
    with pytest.raises(
        RuntimeError, match='warmup_epochs=4 needs the epoch of a run of mmengine.*train with its Runner'
    ):
        loss(*inputs())
    for epoch, share in enumerate((0.25, 0.5, 0.75, 1.0, 1.0)):
        hub.update_info('epoch', epoch)
        assert_near(loss(*inputs()), share * expected.detach())
    with pytest.raises(ValueError, match='warmup_epochs should be at least 0, got -1'):
        WeightedLoss(config, warmup_epochs=-1)


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_logits_of_ignored_targets_need_not_be_finite(name, bad):
    """What is ignored may be anything: the others' loss, gradient and statistics are as without it."""

    def results(ignored):
        preds_S, preds_T = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        preds_S[2, 1], preds_T[2, 3] = ignored, ignored
        preds_S.requires_grad_()
        loss = WeightedLoss(LOSSES[name].config, dict(type='WSLWeighting', scale_free=True))
        value = loss(preds_S, preds_T, torch.tensor([0, 1, -100, 3, 4, 0]))
        return dict(value=value, gradient=torch.autograd.grad(value, preds_S)[0], **loss.statistics)

    found = results(bad)
    assert all(value.isfinite().all() for value in found.values()) and not found['gradient'][2].any()
    torch.testing.assert_close(found, results(0.5))
