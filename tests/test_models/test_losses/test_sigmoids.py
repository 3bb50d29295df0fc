"""Heads of sigmoids: qualities, background, weights per target, and what a mean divides by."""

import math

import pytest
import torch
from torch import distributed, multiprocessing

from mmwsl.models.losses import SoftCrossEntropy, WeightedLoss

CLASSES = 4
WSL = dict(type='WSLWeighting')
PRODUCT = dict(type='ProductWeighting', factors=[WSL, dict(type='DisagreementWeighting')])


def example(n=6):
    generator = torch.Generator().manual_seed(3)
    preds_S, preds_T = torch.randn(2, n, CLASSES, generator=generator, dtype=torch.float64).mul(2)
    labels = torch.tensor([1, 4, -100, 0, 4, 3] * n)[:n]  # 4 is background
    quality = torch.tensor([0.75, 0, 0.5, 1, 0, 0] * n)[:n]
    return preds_S.requires_grad_(), preds_T, labels, quality


def bce(z, y):
    """Of one decision, exact where it is small."""
    return y * math.log1p(math.exp(-z)) + (1 - y) * math.log1p(math.exp(z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def decisions(preds_S, preds_T, labels, quality):
    """(target, class, z_s, z_t, score) of all targets kept."""
    for i, label in enumerate(labels.tolist()):
        if label != -100:
            for c in range(CLASSES):
                score = (1.0 if quality is None else quality[i].item()) if label == c else 0.0
                yield i, c, preds_S[i, c].item(), preds_T[i, c].item(), score


def reference(preds_S, preds_T, labels, quality, tau=1.0, disagreement=False):
    """Sum over targets and classes, each weighted by itself."""
    total = 0.0
    for _, _, z_s, z_t, y in decisions(preds_S, preds_T, labels, quality):
        weight = 1 - math.exp(-bce(z_s, y) / (bce(z_t, y) + 1e-7))
        if disagreement:
            weight *= abs(sigmoid(z_s) - sigmoid(z_t))
        total += weight * tau**2 * bce(z_s / tau, sigmoid(z_t / tau))
    return total


@pytest.mark.parametrize('weighting', [WSL, PRODUCT], ids=['WSL', 'WSL x disagreement'])
@pytest.mark.parametrize('qualities', [False, True])
@pytest.mark.parametrize('tau', [1.0, 2.0])
def test_background_and_quality_against_a_loop(tau, qualities, weighting):
    preds_S, preds_T, labels, quality = example()
    quality = quality if qualities else None
    loss = WeightedLoss(dict(type='BernoulliKD', tau=tau), weighting, reduction='sum')
    value = loss(preds_S, preds_T, (labels, quality) if qualities else labels)
    expected = reference(preds_S, preds_T, labels, quality, tau, weighting is PRODUCT)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_the_same_targets_as_scores():
    preds_S, preds_T, labels, quality = example()
    kept = labels != -100
    scores = torch.zeros(6, CLASSES, dtype=torch.float64)
    scores[0, 1], scores[3, 0] = 0.75, 1.0
    loss = WeightedLoss(dict(type='BernoulliKD'), WSL, reduction='sum')
    assert loss(preds_S, preds_T, (labels, quality)).item() == pytest.approx(
        loss(preds_S[kept], preds_T[kept], scores[kept]).item(), rel=1e-12
    )


def test_a_weight_per_target_sums_the_hard_losses_of_its_classes():
    preds_S, preds_T, labels, _ = example()
    found = list(decisions(preds_S, preds_T, labels, None))
    expected = 0.0
    for target in range(6):
        rows = [(z_s, z_t, y) for i, _, z_s, z_t, y in found if i == target]
        if rows:
            student, teacher = sum(bce(z_s, y) for z_s, _, y in rows), sum(bce(z_t, y) for _, z_t, y in rows)
            weight = 1 - math.exp(-student / (teacher + 1e-7))
            expected += weight * sum(4 * bce(z_s / 2, sigmoid(z_t / 2)) for z_s, z_t, _ in rows)
    loss = WeightedLoss(dict(type='BernoulliKD', tau=2.0, per_class=False), WSL, reduction='sum')
    assert loss(preds_S, preds_T, labels).item() == pytest.approx(expected, rel=1e-12)
    assert loss.last_call.weight.shape == (6,)


@pytest.mark.parametrize('per_class', [True, False])
def test_a_mean_over_targets_or_positives(per_class):
    preds_S, preds_T, labels, _ = example()
    config = dict(type='BernoulliKD', per_class=per_class)
    total = WeightedLoss(config, WSL, reduction='sum')(preds_S, preds_T, labels).item()
    assert WeightedLoss(config, WSL)(preds_S, preds_T, labels).item() == pytest.approx(total / 5)  # one is ignored
    positives = WeightedLoss(config, WSL, average='positives')
    assert positives(preds_S, preds_T, labels).item() == pytest.approx(total / 3)
    # a class whose quality is 0 is a positive still
    assert WeightedLoss(config, average='positives')(
        preds_S, preds_T, (labels, torch.zeros(6))
    ).item() == pytest.approx(WeightedLoss(config, reduction='sum')(preds_S, preds_T, labels).item() / 3)


@pytest.mark.parametrize('target', [4, -100])
def test_no_positives_and_no_targets(target):
    preds_S, preds_T, *_ = example()
    loss = WeightedLoss(dict(type='BernoulliKD'), PRODUCT, average='positives')
    value = loss(preds_S, preds_T, torch.full((6,), target))
    value.backward()
    assert math.isfinite(value.item()) and preds_S.grad.isfinite().all()
    assert (value.item() == 0) == (target == -100)
    statistics = {name: statistic.item() for name, statistic in loss.statistics.items()}
    assert statistics['wsl_weight_positive'] == 0
    assert statistics['negative_share'] == (1.0 if target == 4 else 0.0)
    assert all(map(math.isfinite, statistics.values()))


def test_weights_of_labels_and_of_targets():
    preds_S, preds_T, labels, _ = example()
    loss = WeightedLoss(dict(type='BernoulliKD'), reduction='sum')
    of_labels = torch.zeros(6, CLASSES)
    of_labels[0, 2] = 0.5
    expected = 0.5 * bce(preds_S[0, 2].item(), sigmoid(preds_T[0, 2].item()))
    assert loss(preds_S, preds_T, labels, weight=of_labels).item() == pytest.approx(expected)
    of_targets = torch.tensor([0.0, 1, 1, 0, 0, 0])
    expected = sum(bce(z_s, sigmoid(z_t)) for i, _, z_s, z_t, _ in decisions(preds_S, preds_T, labels, None) if i == 1)
    assert loss(preds_S, preds_T, labels, weight=of_targets).item() == pytest.approx(expected)


def test_what_is_refused():
    preds_S, preds_T, labels, quality = example()
    with pytest.raises(ValueError, match="^average='positives' is for sigmoid heads"):
        WeightedLoss(SoftCrossEntropy(), average='positives')
    with pytest.raises(ValueError, match='^average should be one of'):
        WeightedLoss(SoftCrossEntropy(), average='boxes')
    with pytest.raises(TypeError, match='SoftCrossEntropy takes class indices or class scores, got a tuple of 2'):
        WeightedLoss(SoftCrossEntropy())(preds_S, preds_T, (labels.clamp(max=3), quality))
    loss = WeightedLoss(dict(type='BernoulliKD'))
    with pytest.raises(ValueError, match=r'class indices should lie in \[0, 5\)'):
        loss(preds_S, preds_T, labels + 1)
    with pytest.raises(ValueError, match='each class index should have one quality'):
        loss(preds_S, preds_T, (labels, quality[:3]))
    with pytest.raises(ValueError, match=r'label scores should lie in \[0, 1\]'):
        loss(preds_S, preds_T, (labels, quality + 1))
    with pytest.raises(ValueError, match='the weight needs one outcome for each target'):
        WeightedLoss(dict(type='BernoulliKD', per_class=False), dict(type='RegularizationWeighting'))


@pytest.mark.parametrize('per_class', [True, False])
def test_background_is_a_label_in_a_graph_and_what_is_beyond_it_is_reported(per_class):
    preds_S, preds_T, labels, _ = example()
    loss = WeightedLoss(dict(type='BernoulliKD', per_class=per_class), WSL)
    compiled = torch.compile(loss, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(preds_S, preds_T, labels), loss(preds_S, preds_T, labels))
    labels[1] = 5
    with pytest.raises(RuntimeError, match=r'a class index is not in \[0, 5\)'):
        compiled(preds_S, preds_T, labels)


# ---- several processes


def gradient_of_part(rank, folder, average):
    """Of the mean over processes, as DistributedDataParallel takes it."""
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    preds_S, preds_T, labels, _ = example(6)
    part = slice(0, 4) if rank == 0 else slice(4, 6)  # 2 and 1 positives, 3 and 2 kept
    loss = WeightedLoss(dict(type='BernoulliKD'), WSL, average=average, sync_divisor=True)
    value = loss(preds_S[part], preds_T[part], labels[part])
    value.backward()
    torch.save((value.detach() / 2, preds_S.grad / 2), f'{folder}/{rank}.pth')
    distributed.destroy_process_group()


@pytest.mark.parametrize('average', ['targets', 'positives'])
def test_two_processes_with_unequal_targets_are_one_with_all(average, tmp_path):
    multiprocessing.start_processes(gradient_of_part, (str(tmp_path), average), 2, start_method='fork')
    parts = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    preds_S, preds_T, labels, _ = example(6)
    value = WeightedLoss(dict(type='BernoulliKD'), WSL, average=average)(preds_S, preds_T, labels)
    value.backward()
    torch.testing.assert_close(sum(part[0] for part in parts), value.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(part[1] for part in parts), preds_S.grad, rtol=1e-12, atol=1e-14)
