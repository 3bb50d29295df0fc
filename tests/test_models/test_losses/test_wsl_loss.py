import math
import sys
from typing import NamedTuple

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmwsl import functional
from mmwsl.models import losses
from mmwsl.models.losses import WSLLoss, fused

PERCENTILES = ('wsl_weight_p10', 'wsl_weight_p50', 'wsl_weight_p90')
SHAPES = [(1, 2), (5, 7), (64, 100), (2, 5, 3), (2, 19, 4, 4), (3, 4, 2, 2, 2), (0, 5)]
# rtol and atol of the loss and of its gradient. Half-precision logits are computed in float32, so that only the
# gradient, which takes the logits' own type, is rounded to half precision.
TOLERANCES = {
    torch.float64: (dict(rtol=1e-9, atol=1e-12), dict(rtol=1e-9, atol=1e-12)),
    torch.float32: (dict(rtol=1e-5, atol=1e-6), dict(rtol=1e-5, atol=1e-6)),
    torch.float16: (dict(rtol=1e-5, atol=1e-6), dict(rtol=6e-4, atol=1e-6)),
    torch.bfloat16: (dict(rtol=1e-5, atol=1e-6), dict(rtol=5e-3, atol=1e-6)),
}


class Reference(NamedTuple):
    """What the loss should be, with one value for each target, and its gradient if the targets are summed up."""

    losses: list[float]
    weights: list[float]
    regularizing: list[bool]
    kept: int
    gradient: Tensor

    @property
    def count(self):
        return max(self.kept, 1)


def log_softmax(logits, tau=1.0):
    scaled = [logit / tau for logit in logits]
    largest = max(scaled)
    log_sum = largest + math.log(math.fsum(math.exp(logit - largest) for logit in scaled))
    return [logit - log_sum for logit in scaled]


def cross_entropy(scores, log_probabilities):
    return -math.fsum(score * log_p for score, log_p in zip(scores, log_probabilities, strict=True))


def class_vectors(tensor):
    """One list of class values for each target, in the order of an index target's elements."""
    return tensor.detach().double().movedim(1, -1).reshape(-1, tensor.shape[1]).tolist()


def reference(preds_S, preds_T, target, tau, ignore_index=-100):
    """The paper's formulas, one target after the other, in plain Python."""
    losses, weights, regularizing, gradients, kept = [], [], [], [], 0
    targets = class_vectors(target) if target.is_floating_point() else target.flatten().tolist()
    for z_s, z_t, y in zip(class_vectors(preds_S), class_vectors(preds_T), targets, strict=True):
        if y == ignore_index:
            losses.append(0.0)
            weights.append(0.0)
            regularizing.append(False)
            gradients.append([0.0] * len(z_s))
            continue
        kept += 1
        scores = y if isinstance(y, list) else [float(y == c) for c in range(len(z_s))]
        hard_loss_s, hard_loss_t = cross_entropy(scores, log_softmax(z_s)), cross_entropy(scores, log_softmax(z_t))
        weight = 1 - math.exp(-hard_loss_s / (hard_loss_t + 1e-7))
        log_p_s = log_softmax(z_s, tau)
        p_s = [math.exp(log_p) for log_p in log_p_s]
        p_t = [math.exp(log_p) for log_p in log_softmax(z_t, tau)]
        losses.append(weight * tau**2 * cross_entropy(p_t, log_p_s))
        weights.append(weight)
        gradients.append([weight * tau * (s - t) for s, t in zip(p_s, p_t, strict=True)])
        if not isinstance(y, list):
            a = math.exp(log_softmax(z_s)[y]) - 1
            regularizing.append(abs(tau * (p_s[y] - p_t[y]) - a) > abs(a))
    batch, classes, *dense = preds_S.shape
    gradient = torch.tensor(gradients, dtype=torch.float64).reshape(batch, *dense, classes).movedim(-1, 1)
    return Reference(losses, weights, regularizing, kept, gradient)


def example(shape=(8, 5), dtype=torch.float64, kind='indices', ignore_index=-100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    preds_S, preds_T = (2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    if kind == 'scores':
        target = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
    else:
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    if kind == 'some ignored':
        target.view(-1)[1::3] = ignore_index
    return preds_S.requires_grad_(), preds_T, target


def gradient(loss, preds, upstream=None):
    return torch.autograd.grad(loss, preds, upstream, retain_graph=True)[0]


def assert_near(actual, expected, **tolerance):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64), **tolerance)


# ---- against the reference


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('tau', [0.5, 1, 2, 4])
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('kind', ['indices', 'some ignored', 'scores'])
def test_loss_and_gradient_against_the_reference(shape, tau, dtype, kind):
    preds_S, preds_T, target = example(shape, dtype, kind)
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    expected = reference(preds_S, preds_T, target, tau)

    loss = WSLLoss(tau=tau, loss_weight=2.25)(preds_S, preds_T, target)
    assert_near(loss, 2.25 * math.fsum(expected.losses) / expected.count, **loss_tolerance)
    loss.backward()
    assert preds_S.grad.dtype == dtype
    assert_near(preds_S.grad, 2.25 * expected.gradient / expected.count, **gradient_tolerance)


@pytest.mark.parametrize(('dtype', 'kind'), [(torch.float32, 'some ignored'), (torch.bfloat16, 'scores')], ids=str)
def test_compiled_kernels_against_the_reference(dtype, kind):
    torch._dynamo.reset(), torch._dynamo.utils.counters.clear()
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    module = WSLLoss(tau=3.0, compile=True)
    for shape in [(5, 7), (3, 7), (2, 5, 3)]:  # the last batch of an epoch is smaller
        preds_S, preds_T, target = example(shape, dtype, kind)
        expected = reference(preds_S, preds_T, target, tau=3.0)
        loss = module(preds_S, preds_T, target)
        assert_near(loss, 2.5 * math.fsum(expected.losses) / expected.count, **loss_tolerance)
        assert_near(gradient(loss, preds_S), 2.5 * expected.gradient / expected.count, **gradient_tolerance)
    compiled = torch._dynamo.utils.counters
    assert compiled['stats']['unique_graphs'] >= 1 and not compiled['graph_break']


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('kind', ['indices', 'some ignored', 'scores'])
def test_reductions_against_the_reference(shape, kind):
    preds_S, preds_T, target = example(shape, kind=kind)
    expected = reference(preds_S, preds_T, target, tau=2.0)
    losses = 2.5 * torch.tensor(expected.losses, dtype=torch.float64).reshape(shape[0], *shape[2:])

    none, total, mean = (
        WSLLoss(reduction=reduction)(preds_S, preds_T, target) for reduction in ('none', 'sum', 'mean')
    )
    assert_near(none, losses)
    assert_near(total, losses.sum())
    assert_near(mean, losses.sum() / expected.count)
    assert_near(gradient(none, preds_S, torch.ones_like(none)), 2.5 * expected.gradient)
    assert_near(gradient(total, preds_S), 2.5 * expected.gradient)


def test_the_defaults_are_those_of_the_paper_on_imagenet():
    preds_S, preds_T, target = example(kind='some ignored')
    expected = reference(preds_S, preds_T, target, tau=2.0)
    assert_near(WSLLoss()(preds_S, preds_T, target), 2.5 * math.fsum(expected.losses) / expected.count)


@pytest.mark.parametrize('kind', ['indices', 'some ignored', 'scores'])
def test_the_module_is_the_function_with_a_weight_and_a_reduction(kind):
    preds_S, preds_T, target = example((2, 5, 3), kind=kind)
    torch.testing.assert_close(
        WSLLoss(tau=4, loss_weight=3.0, reduction='none')(preds_S, preds_T, target),
        3 * functional.wsl_loss(preds_S, preds_T, target, tau=4),
    )


# ---- gradients


@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('tau', [1.0, 2.0, 3.0, 4.0])
def test_gradient_with_the_weight_held_fixed(reduction, tau):
    preds_S, preds_T, target = example((2, 5, 3), kind='some ignored')
    preds_S = preds_S.detach().requires_grad_()
    # A numerical gradient moves the logits, and the weight with them unless it is a constant.
    weight = functional.wsl_weight(preds_S, preds_T, target)
    count = (target != functional.IGNORE_INDEX).sum() if reduction == 'mean' else 1

    def held_fixed(preds):
        loss = 2.5 * weight * functional.soft_cross_entropy(preds, preds_T, tau) / count
        return loss if reduction == 'none' else loss.sum()

    assert torch.autograd.gradcheck(held_fixed, preds_S)
    upstream = torch.randn_like(held_fixed(preds_S))
    (expected,) = torch.autograd.grad(held_fixed(preds_S), preds_S, upstream)
    loss = WSLLoss(tau=tau, loss_weight=2.5, reduction=reduction)(preds_S, preds_T, target)
    torch.testing.assert_close(torch.autograd.grad(loss, preds_S, upstream), (expected,))


@pytest.mark.parametrize('kind', ['indices', 'scores'])
def test_the_teacher_gets_no_gradient(kind):
    preds_S, preds_T, target = example(kind=kind)
    preds_T.requires_grad_()
    WSLLoss()(preds_S, preds_T, target).backward()
    assert preds_T.grad is None
    assert not WSLLoss()(preds_S.detach(), preds_T, target).requires_grad


@pytest.mark.parametrize('scale', [-1.5, 0.0, 1024.0])
def test_an_upstream_gradient_scales_the_gradient(scale):
    preds_S, preds_T, target = example()
    loss = WSLLoss()(preds_S, preds_T, target)
    expected = reference(preds_S, preds_T, target, tau=2.0)
    assert_near(gradient(scale * loss, preds_S), scale * 2.5 * expected.gradient / expected.count)


def test_an_upstream_gradient_for_each_target():
    preds_S, preds_T, target = example((2, 5, 3))
    upstream = torch.arange(6, dtype=torch.float64).reshape(2, 3) - 2
    loss = WSLLoss(reduction='none')(preds_S, preds_T, target)
    expected = reference(preds_S, preds_T, target, tau=2.0)
    assert_near(gradient(loss, preds_S, upstream), 2.5 * upstream.unsqueeze(1) * expected.gradient)


# ---- extreme logits and precision


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
@pytest.mark.parametrize('tau', [0.5, 2.0, 4.0])
def test_logits_of_ten_thousand(dtype, tau):
    # The student is sure of the wrong class (z_y is 2e4 below it), then of the right one; the teacher of the right one.
    # Row 0: L_s = 2e4 and L_t = 0, so w = 1; H = 2e4 / tau, so the loss is tau * 2e4. Row 1: L_s = L_t = 0, so w = 0.
    preds_S = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    preds_T = torch.tensor([[-1e4, 1e4], [-1e4, 1e4]], dtype=dtype)
    gap = (preds_S[0, 0] - preds_T[0, 0].double()).item()  # 2e4 as rounded by the dtype
    loss = WSLLoss(tau, loss_weight=1.0, reduction='none')(preds_S, preds_T, torch.tensor([1, 1]))
    assert loss.tolist() == [pytest.approx(tau * gap), 0]
    assert gradient(loss, preds_S, torch.ones_like(loss)).tolist() == [[tau, -tau], [0, 0]]


@pytest.mark.parametrize(
    'dtype, expected',
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
def test_type_of_the_loss(dtype, expected, reduction):
    assert WSLLoss(reduction=reduction)(*example(dtype=dtype)).dtype == expected


def test_autocast_computes_in_float32():
    features, preds_T, target = example((8, 5), torch.float32)
    layer = nn.Linear(5, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 25).reshape(5, 5))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = layer(features)
        loss = WSLLoss()(logits, preds_T, target)
        loss_of_float32 = WSLLoss()(preds_T.flip(1), preds_T, target)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == loss_of_float32.dtype == torch.float32
    assert torch.equal(loss, WSLLoss()(logits.float(), preds_T, target))
    assert torch.equal(loss_of_float32, WSLLoss()(preds_T.flip(1), preds_T, target))
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


# ---- ignored targets, weights and reductions


@pytest.mark.parametrize('ignore_index', [-100, 255, 0])
def test_the_mean_is_over_the_targets_kept(ignore_index):
    preds_S, preds_T, target = example()
    target = target.clamp(min=1)
    kept = torch.tensor([True, False, True, True, False, False, True, True])
    loss = WSLLoss(ignore_index=ignore_index)
    alone = loss(preds_S[kept], preds_T[kept], target[kept])
    among_ignored = loss(preds_S, preds_T, torch.where(kept, target, ignore_index))
    torch.testing.assert_close(among_ignored, alone)
    torch.testing.assert_close(gradient(among_ignored, preds_S), gradient(alone, preds_S))
    assert not gradient(among_ignored, preds_S)[~kept].any()


@pytest.mark.parametrize('shape', [(8, 5), (2, 5, 3, 3), (0, 5)], ids=str)
@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('ignore_index', [-100, 255])
def test_no_target_kept(shape, reduction, ignore_index):
    preds_S, preds_T, target = example(shape)
    loss = WSLLoss(ignore_index=ignore_index, reduction=reduction)
    result = loss(preds_S, preds_T, torch.full_like(target, ignore_index))
    assert torch.equal(result, torch.zeros(target.shape if reduction == 'none' else (), dtype=torch.float64))
    assert torch.equal(gradient(result, preds_S, torch.ones_like(result)), torch.zeros_like(preds_S))
    assert {name: value.item() for name, value in loss.statistics.items()} == dict.fromkeys(
        ('kl', 'wsl_weight', *PERCENTILES, 'regularization_share'), 0
    )


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.int64, torch.bool])
def test_weight_multiplies_the_loss_of_each_target(dtype):
    preds_S, preds_T, target = example((2, 5, 3), torch.float32, kind='some ignored')
    weight = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    each = WSLLoss(reduction='none')(preds_S, preds_T, target)
    expected = each * weight.float()

    result = WSLLoss(reduction='none')(preds_S, preds_T, target, weight=weight)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(WSLLoss(reduction='sum')(preds_S, preds_T, target, weight=weight), expected.sum())
    # As everywhere in OpenMMLab, the mean counts targets, not weights.
    torch.testing.assert_close(WSLLoss()(preds_S, preds_T, target, weight=weight), expected.sum() / 4)


@pytest.mark.parametrize('avg_factor', [1, 3, 0.5])
def test_avg_factor_replaces_the_number_of_targets(avg_factor):
    preds_S, preds_T, target = example(kind='some ignored')
    total = WSLLoss(reduction='sum')(preds_S, preds_T, target)
    torch.testing.assert_close(WSLLoss()(preds_S, preds_T, target, avg_factor=avg_factor), total / avg_factor)


def test_avg_factor_leaves_single_losses_alone():
    inputs, loss = example(), WSLLoss(reduction='none')
    torch.testing.assert_close(loss(*inputs, avg_factor=3), loss(*inputs))


@pytest.mark.parametrize('loss, override', [(WSLLoss(reduction='sum'), None), (WSLLoss(), 'sum')])
def test_avg_factor_does_not_go_with_a_sum(loss, override):
    with pytest.raises(ValueError, match=r"^avg_factor belongs to reduction 'mean', got avg_factor=3 with 'sum'$"):
        loss(*example(), avg_factor=3, reduction_override=override)


@pytest.mark.parametrize('override', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
def test_reduction_override_holds_for_one_call(reduction, override):
    inputs, loss = example(), WSLLoss(reduction=reduction)
    usual = loss(*inputs)
    assert torch.equal(loss(*inputs, reduction_override=override), WSLLoss(reduction=override)(*inputs))
    assert torch.equal(loss(*inputs), usual)


# ---- statistics


@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('tau', [0.5, 2.0, 4.0])
@pytest.mark.parametrize('kind', ['indices', 'some ignored'])
def test_statistics_against_the_reference(shape, tau, kind):
    preds_S, preds_T, target = example(shape, kind=kind)
    loss = WSLLoss(tau)
    loss(preds_S, preds_T, target)
    expected = reference(preds_S, preds_T, target, tau)
    assert set(loss.statistics) == {'kl', 'wsl_weight', *PERCENTILES, 'regularization_share'}
    assert_near(loss.statistics['wsl_weight'], math.fsum(expected.weights) / expected.count)
    assert loss.statistics['regularization_share'].item() == pytest.approx(sum(expected.regularizing) / expected.count)
    assert not any(value.requires_grad for value in loss.statistics.values())


def test_statistics_are_those_of_the_last_batch():
    loss = WSLLoss()
    assert loss.statistics == {}
    loss(*example())
    preds_S, preds_T, scores = example(kind='scores')
    loss(preds_S, preds_T, scores)
    # Scores have no true class, so the share of the batch before must not stay.
    assert set(loss.statistics) == {'kl', 'wsl_weight', *PERCENTILES}
    assert_near(loss.statistics['wsl_weight'], math.fsum(reference(preds_S, preds_T, scores, 2.0).weights) / 8)


def test_a_tie_is_no_regularization_sample():
    # A student equal to its teacher has b = -a exactly.
    preds, _, target = example()
    loss = WSLLoss()
    loss(preds, preds.detach(), target)
    assert loss.statistics['regularization_share'].item() == 0


def test_a_weight_does_not_change_the_statistics():
    inputs, loss = example(), WSLLoss()
    loss(*inputs)
    expected = dict(loss.statistics)
    loss(*inputs, weight=torch.zeros(8), reduction_override='sum')
    assert loss.statistics == expected


# ---- weightings, the controls


def test_label_free_is_short_for_the_weighting_that_looks_at_the_teachers_class():
    preds_S, preds_T = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])  # the teacher's class is 0
    # L_s = ln 2, L_t = ln 4/3: w = 1 - exp(-ln 2 / ln 4/3) = 0.910133, and the soft cross-entropy is ln 2
    for label in (0, 1):
        loss = WSLLoss(1.0, 1.0, weighting='label_free')(preds_S, preds_T, torch.tensor([label]))
        assert loss.item() == pytest.approx(0.630856, abs=1e-5)


@pytest.mark.parametrize('shape', [(5, 7), (2, 5, 3)], ids=str)
def test_weights_of_one_are_mmrazors_kl_divergence(shape):
    from mmrazor.models.losses import KLDivergence  # imported here, for it needs mmwsl's import before its own

    preds_S, preds_T, target = example(shape)
    ours = WSLLoss(4.0, 2.25, reduction='sum', weighting='one')(preds_S, preds_T, target)
    theirs = KLDivergence(4.0, reduction='sum', loss_weight=2.25)(preds_S, preds_T)
    torch.testing.assert_close(gradient(ours, preds_S), gradient(theirs, preds_S), rtol=1e-9, atol=1e-12)


def test_weights_of_one_are_mmrazors_kl_divergence_by_default_settings():
    from mmrazor.models.losses import KLDivergence

    preds_S, preds_T, target = example((5, 7))
    ours, theirs = WSLLoss(4.0, 2.25, weighting='one')(preds_S, preds_T, target), KLDivergence(4.0, loss_weight=2.25)
    torch.testing.assert_close(gradient(ours, preds_S), gradient(theirs(preds_S, preds_T), preds_S))


@pytest.mark.parametrize(
    'weighting, of_regularization, of_others',
    [('one', 1, 1), ('drop_regularization', 0, 1), ('only_regularization', 1, 0)],
)
@pytest.mark.parametrize('kind', ['indices', 'some ignored'])
def test_weight_of_regularization_samples_and_of_others(weighting, of_regularization, of_others, kind):
    preds_S, preds_T, target = example((64, 5), kind=kind)
    expected = reference(preds_S, preds_T, target, 2.0)
    soft = functional.soft_cross_entropy(preds_S, preds_T, 2.0).detach()
    assert 0 < sum(expected.regularizing) < expected.kept
    wanted = torch.tensor([of_regularization if regularizing else of_others for regularizing in expected.regularizing])
    kept = target != -100
    loss = WSLLoss(2.0, 3.0, weighting=weighting)
    assert_near(loss(preds_S, preds_T, target, reduction_override='none'), 3.0 * soft * wanted * kept)
    assert_near(loss(preds_S, preds_T, target), (3.0 * soft * wanted * kept).sum() / expected.kept)
    assert_near(loss.statistics['wsl_weight'], (wanted * kept).sum() / expected.kept)


def test_random_weights_are_the_same_weights_of_other_targets():
    preds_S, preds_T, target = example((64, 5), kind='some ignored')
    expected = torch.tensor(reference(preds_S, preds_T, target, 2.0).weights, dtype=torch.float64)
    soft, kept = functional.soft_cross_entropy(preds_S, preds_T, 2.0).detach(), target != -100
    loss = WSLLoss(2.0, 1.0, weighting='random')
    torch.manual_seed(5)
    applied = loss(preds_S, preds_T, target, reduction_override='none').detach() / soft
    assert_near(applied[kept].sort().values, expected[kept].sort().values)
    assert (applied[kept] - expected[kept]).abs().gt(1e-3).float().mean() > 0.5
    assert not applied[~kept].any()
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)  # dropout and mixup draw what they draw without it
    again = WSLLoss(2.0, 1.0, weighting='random')(preds_S, preds_T, target, reduction_override='none').detach() / soft
    assert_near(again, applied)


@pytest.mark.parametrize('weighting', ['drop_regularization', 'only_regularization'])
def test_class_scores_have_no_regularization_samples(weighting):
    with pytest.raises(ValueError, match='RegularizationWeighting needs class indices, got class scores'):
        WSLLoss(weighting=weighting)(*example(kind='scores'))


def test_an_unknown_weighting():
    with pytest.raises(ValueError, match=r"weighting should be one of \('wsl', 'one', .*got 'two'"):
        WSLLoss(weighting='two')


@pytest.mark.parametrize('weighting', ['wsl', 'one', 'random'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_sample_terms_are_those_of_the_functions(shape, weighting):
    preds_S, preds_T, target = example(shape, kind='some ignored')
    loss = WSLLoss(2.0, weighting=weighting)
    assert loss.sample_terms == {}
    loss(preds_S, preds_T, target)
    terms, kept = loss.sample_terms, target != -100
    a, b = functional.bias_and_variance_gradients(preds_S, preds_T, target, 2.0)
    expected = dict(
        w=functional.wsl_weight(preds_S, preds_T, target),
        L_s=functional.hard_loss(preds_S, target),
        L_t=functional.hard_loss(preds_T, target),
        a=a,
        b=b,
    )
    assert torch.equal(terms['kept'], kept)
    for name, values in expected.items():
        assert not terms[name].requires_grad
        assert_near(terms[name][kept], values.detach()[kept], rtol=1e-6, atol=1e-9)


def test_sample_terms_of_class_scores_have_no_true_class():
    preds_S, preds_T, scores = example(kind='scores')
    loss = WSLLoss()
    loss(preds_S, preds_T, scores)
    terms = loss.sample_terms
    assert terms['a'].isnan().all() and terms['b'].isnan().all()
    assert_near(terms['L_t'], functional.hard_loss(preds_T, scores))


# ---- errors

LOGITS = torch.zeros(4, 5)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    'preds_S, preds_T, target, error, message',
    [
        (LOGITS.long(), LOGITS, LABELS, TypeError, r'^preds_S should be floating-point logits, got torch\.int64$'),
        (LOGITS, LOGITS.long(), LABELS, TypeError, r'^preds_T should be floating-point logits, got torch\.int64$'),
        (LOGITS[0], LOGITS[0], LABELS, ValueError, r'^preds_S should have shape \(N, C\) or \(N, C, \*\), got \(5,\)$'),
        (LOGITS, torch.zeros(4, 7), LABELS, ValueError, 'got 5 from the student and 7 from the teacher$'),
        (LOGITS, LOGITS[:3], LABELS, ValueError, r'should have the same shape, got \(4, 5\) and \(3, 5\)$'),
        (LOGITS, LOGITS, LABELS.int(), TypeError, r'^target should hold class indices .* got torch\.int32$'),
        (LOGITS, LOGITS, LABELS[:3], ValueError, r'^class indices should have shape \(4,\) .* got \(3,\)$'),
        (LOGITS, LOGITS, LABELS + 5, ValueError, r'^class indices should lie in \[0, 5\) .*=-100, got 5$'),
        (LOGITS, LOGITS, LABELS - 1, ValueError, r'^class indices should lie in \[0, 5\) .*=-100, got -1$'),
        (LOGITS, LOGITS, LOGITS[:, :4], ValueError, r'^class scores .* \(4, 5\), got \(4, 4\)$'),
    ],
)
def test_inputs_that_do_not_belong_together(preds_S, preds_T, target, error, message):
    with pytest.raises(error, match=message):
        WSLLoss()(preds_S, preds_T, target)


def test_only_its_own_ignore_index_is_ignored():
    with pytest.raises(ValueError, match=r'ignore_index=255, got -100$'):
        WSLLoss(ignore_index=255)(LOGITS, LOGITS, LABELS - 100)


@pytest.mark.parametrize('tau', [0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_positive(tau):
    with pytest.raises(ValueError, match=f'^tau should be a positive number, got {tau}$'):
        WSLLoss(tau=tau)


@pytest.mark.parametrize('shape', [(), (1,), (3,), (4, 1), (4, 5)])
def test_weight_of_another_shape(shape):
    # (1,) and (4, 1) would broadcast, and be wrong without a word.
    with pytest.raises(ValueError, match=r'^weight should have one value per target, \(4,\), got \('):
        WSLLoss()(LOGITS, LOGITS, LABELS, weight=torch.ones(shape))


def test_an_unknown_reduction():
    message = r"^reduction should be one of \('none', 'mean', 'sum'\), got 'average'$"
    with pytest.raises(ValueError, match=message):
        WSLLoss(reduction='average')
    with pytest.raises(ValueError, match=message):
        WSLLoss()(LOGITS, LOGITS, LABELS, reduction_override='average')


# ---- other devices


@pytest.mark.parametrize('reduction', ['none', 'sum', 'mean'])
@pytest.mark.parametrize('kind', ['indices', 'scores'])
def test_nothing_waits_for_a_device(kind, reduction):
    preds_S, preds_T, target = (tensor.detach().to('meta') for tensor in example((2, 5, 3), torch.float32, kind))
    preds_S.requires_grad_()
    # A meta tensor has no values: to read one, which on CUDA waits for the device, raises.
    loss = WSLLoss(reduction=reduction)(preds_S, preds_T, target, weight=torch.ones(2, 3, device='meta'))
    loss.sum().backward()
    assert loss.shape == ((2, 3) if reduction == 'none' else ())
    assert preds_S.grad.is_meta and preds_S.grad.shape == (2, 5, 3)


class Made(TorchDispatchMode):
    """Operations and the sizes of what they make; views, and memory that nothing is written to, are left out."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_view = any(given.alias_info and not given.alias_info.is_write for given in function._schema.returns)
        if isinstance(result, (Tensor, type(None))) and not is_view and 'empty' not in function.name():
            self.tensors.append((function.name(), 0 if result is None else result.numel()))
        return result


@pytest.mark.parametrize(('weighting', 'forward', 'backward'), [('wsl', 40, 6), ('one', 37, 6)])
def test_operations_off_the_cpu(weighting, forward, backward):
    """Each is a launch or more on a GPU; backward's first is the 1 that it begins with."""
    preds_S = torch.empty(64, 100, device='meta', requires_grad=True)
    preds_T, target = torch.empty(64, 100, device='meta'), torch.empty(64, dtype=torch.int64, device='meta')
    with Made() as made:
        loss = WSLLoss(weighting=weighting)(preds_S, preds_T, target)
    assert len(made.tensors) == forward
    with Made() as made:
        loss.backward()
    assert len(made.tensors) == backward


def test_without_triton_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'triton', None)  # cannot be imported
    monkeypatch.delitem(sys.modules, 'mmwsl.models.losses.kernel', raising=False)
    monkeypatch.delattr(losses, 'kernel', raising=False)
    with pytest.raises(ImportError, match=r'triton is not installed\. Install mmwsl\[triton\]'):
        WSLLoss(compile='triton')


def test_an_unknown_compiler():
    with pytest.raises(ValueError, match=r"^compile should be False, True or 'triton', got 'tritn'$"):
        WSLLoss(compile='tritn')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('kind', ['indices', 'some ignored', 'scores'])
def test_cuda_agrees_with_the_cpu_and_is_not_waited_for(kind, compile):
    inputs = example((2, 5, 3), torch.float32, kind)
    on_device = [tensor.detach().cuda() for tensor in inputs]
    on_device[0].requires_grad_()
    module = WSLLoss(compile=compile)
    module(*on_device)  # compiling may wait
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss = module(*on_device)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    expected = WSLLoss()(*inputs)
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(on_device[0].grad.cpu(), gradient(expected, inputs[0]))


# ---- beside OpenMMLab


@pytest.mark.parametrize('tau', [1.0, 2.0, 4.0])
@pytest.mark.parametrize('loss_weight', [0.5, 2.5])
@pytest.mark.parametrize('shape', [(5, 7), (64, 100)], ids=str)
def test_equal_to_mmrazor(tau, loss_weight, shape):
    from mmrazor.models.losses import WSLD  # imported here, for it needs mmwsl's import before its own

    preds_S, preds_T, target = example(shape, torch.float32)
    ours = WSLLoss(tau, loss_weight)(preds_S, preds_T, target)
    theirs = WSLD(tau, loss_weight, num_classes=shape[1])(preds_S, preds_T, target)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(ours, preds_S), gradient(theirs, preds_S), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('scope', [None, 'mmengine', 'mmpretrain', 'mmrazor', 'mmwsl'])
@pytest.mark.parametrize('package', ['mmengine', 'mmpretrain', 'mmrazor', 'mmwsl'])
def test_built_from_any_registry_in_any_scope(package, scope):
    registry = pytest.importorskip(f'{package}.registry').MODELS
    with DefaultScope.overwrite_default_scope(scope):
        loss = registry.build(dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25, ignore_index=255, reduction='sum'))
    assert type(loss) is WSLLoss
    assert (loss.tau, loss.loss_weight, loss.ignore_index, loss.reduction) == (4.0, 2.25, 255, 'sum')


def test_repr_names_the_settings():
    shown = repr(WSLLoss(tau=4.0))
    for setting in ('loss_weight=2.5', "reduction='mean'", 'SoftCrossEntropy(tau=4.0)', 'WSLWeighting'):
        assert setting in shown


def test_it_has_nothing_to_train_or_to_save():
    loss = WSLLoss()
    loss(*example())
    assert not list(loss.parameters()) and not loss.state_dict()


@pytest.mark.parametrize('tau', [0.05, 20.0, 100.0])
def test_extreme_temperatures_keep_the_weight(tau):
    generator = torch.Generator().manual_seed(0)
    preds_S, preds_T = torch.randn(2, 4, 1000, generator=generator) * 5
    target = torch.randint(1000, (4,), generator=generator)
    loss = WSLLoss(tau=tau)
    loss(preds_S, preds_T, target)
    expected = functional.wsl_weight(preds_S.double(), preds_T.double(), target).mean()
    torch.testing.assert_close(loss.statistics['wsl_weight'].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(300, 1000), (3, 19, 80, 90), (90000, 3), (2, 300_000)])
def test_blocks_of_a_large_batch_join(shape):
    assert math.prod(shape) > fused._BLOCK
    generator = torch.Generator().manual_seed(0)
    preds_S, preds_T = torch.randn(2, *shape, generator=generator)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    preds_S.requires_grad_()
    expected = functional.wsl_loss(preds_S, preds_T, target, tau=4.0).mean()
    (expected_grad,) = torch.autograd.grad(expected, preds_S)
    loss = WSLLoss(tau=4.0, loss_weight=1.0)(preds_S, preds_T, target)
    (grad,) = torch.autograd.grad(loss, preds_S)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())


@pytest.mark.parametrize('scores', [False, True], ids=['indices', 'scores'])
@pytest.mark.parametrize('layout', ['as it is', 'channels_last', 'turned'])
@pytest.mark.parametrize('tau', [2.0, 3.0])
def test_strips_of_a_large_image_join(tau, layout, scores, monkeypatch):
    preds_S, preds_T = torch.randn(2, 2, 5, 7, 6).mul(3)
    if layout == 'channels_last':
        preds_S, preds_T = (preds.to(memory_format=torch.channels_last) for preds in (preds_S, preds_T))
    elif layout == 'turned':
        preds_S, preds_T = preds_S.transpose(2, 3).contiguous().transpose(2, 3), preds_T
    target = torch.randn(2, 5, 7, 6).softmax(1) if scores else torch.randint(5, (2, 7, 6))
    monkeypatch.setattr(fused, '_BLOCK', 2 * 5 * 6)  # two lines of an image
    shapes, whole = [], fused._block_terms
    monkeypatch.setattr(fused, '_block_terms', lambda *args: shapes.append(args[2].shape) or whole(*args))
    leaf = preds_S.detach().requires_grad_()
    values = WSLLoss(tau, loss_weight=1.0, reduction='none')(leaf, preds_T, target)
    values.sum().backward()
    assert shapes == [(1, 5, lines, 6) for lines in (2, 2, 2, 1)] * 2
    exact = preds_S.double().requires_grad_()
    expected = functional.wsl_loss(exact, preds_T.double(), target.double() if scores else target, tau=tau)
    expected.sum().backward()
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    assert values.double().mean().item() == pytest.approx(expected.mean().item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('tau', [1.0, 2.0, 4.0, 20.0])
@pytest.mark.parametrize('margin_S', [0.0, 6.0, 15.0])
@pytest.mark.parametrize('margin_T', [10.0, 14.0, 19.0, 40.0])
def test_confident_networks_keep_the_weight(tau, margin_S, margin_T):
    # float32 near a loss of 0: the reference is told the same logits in float64
    generator = torch.Generator().manual_seed(0)
    preds_S, preds_T = torch.randn(2, 64, 100, generator=generator)
    target = torch.arange(64)
    preds_S[target, target] += margin_S
    preds_T[target, target] += margin_T
    loss = WSLLoss(tau=tau, reduction='none')
    value = loss(preds_S, preds_T, target)
    expected = 2.5 * functional.wsl_loss(preds_S.double(), preds_T.double(), target, tau)
    torch.testing.assert_close(value.double(), expected, rtol=3e-4, atol=1e-5)
    assert 0 <= loss.statistics['wsl_weight'] <= 1


def test_avg_factor_of_zero_where_nothing_counts_gives_zero():
    preds_S, preds_T, _ = example((3, 5))
    target = torch.full((3,), -100)
    assert WSLLoss()(preds_S, preds_T, target, avg_factor=0) == 0
    assert WSLLoss()(preds_S, preds_T, target, avg_factor=torch.tensor(0)) == 0


def test_a_second_derivative_is_refused_rather_than_wrong():
    preds_S = torch.randn(3, 5, requires_grad=True)
    loss = WSLLoss()(preds_S, torch.randn(3, 5), torch.arange(3))
    with pytest.raises(RuntimeError, match='only a first derivative.*functional.wsl_loss, which has both'):
        torch.autograd.grad(loss, preds_S, create_graph=True)


def test_a_teachers_loss_that_is_given_takes_the_place_of_its_own_and_gets_no_gradient():
    preds_S, preds_T, target = example()
    given = torch.linspace(0.1, 2, 8, dtype=torch.float64, requires_grad=True)
    loss = WSLLoss(loss_weight=1.0, reduction='none')
    result = loss(preds_S, preds_T, target, teacher_hard_loss=given)
    weight = 1 - torch.exp(-nn.functional.cross_entropy(preds_S, target, reduction='none') / given)
    torch.testing.assert_close(result, weight * functional.soft_cross_entropy(preds_S, preds_T), rtol=1e-5, atol=0)
    result.sum().backward()
    assert given.grad is None and not any(term.requires_grad for term in loss.sample_terms.values())
    with pytest.raises(ValueError, match=r'^teacher_hard_loss should have one value per target, \(8,\), got \(8, 1\)'):
        loss(preds_S, preds_T, target, teacher_hard_loss=given.unsqueeze(1))


@pytest.mark.parametrize(
    ('row', 'sums'),
    [
        ([1.0, 0.0, 1.0], '1 to 2'),
        ([0.0, 0.0, 0.5], '0.5 to 1'),
        ([1.5, -0.5, 0.0], '1 to 1'),
        ([math.nan, 0.5, 0.5], 'nan to nan'),
    ],
    ids=['several labels', 'less than one', 'negative', 'nan'],
)
def test_scores_that_are_no_distribution_are_refused(row, sums):
    scores = torch.tensor([[0.5, 0.5, 0.0], row])
    with pytest.raises(ValueError, match=f'at least 0 and sum to 1 for .*got sums from {sums}.*multi-label'):
        WSLLoss()(torch.randn(2, 3), torch.randn(2, 3), scores)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_class_scores_may_be_rounded(dtype):
    scores = torch.full((2, 1000), 1e-4).index_fill(1, torch.tensor([3]), 0.9001).to(dtype)
    WSLLoss()(torch.randn(2, 1000), torch.randn(2, 1000), scores)
