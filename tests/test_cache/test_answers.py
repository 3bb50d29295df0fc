"""Answers against a reference in float64 with loops."""

import math

import numpy as np
import pytest
import torch

from mmwsl.cache import AnswerFormat
from mmwsl.functional import soft_cross_entropy, wsl_weight

TAU = 4.0


def batch(size=16, classes=20, seed=0, scale=4):
    generator = torch.Generator().manual_seed(seed)
    return (
        scale * torch.randn(size, classes, generator=generator),
        torch.randint(classes, (size,), generator=generator),
    )


def restored_by_hand(logits, label, top_k, tau):
    """Top K and true class as they are; the others share what is left at tau."""
    logits = [float(z) for z in logits]
    kept = {*sorted(range(len(logits)), key=lambda j: -logits[j])[:top_k], label}
    rest = sum(math.exp(z / tau) for j, z in enumerate(logits) if j not in kept)
    share = tau * math.log(rest / (len(logits) - len(kept)))
    return [z if j in kept else share for j, z in enumerate(logits)]


@pytest.mark.parametrize('classes', [3, 256, 257, 70_000])
def test_all_float32_logits_come_back_bit_for_bit(classes):
    logits, labels = batch(4, classes)
    form = AnswerFormat(classes)
    answers = form.encode(logits, labels)
    assert torch.equal(form.decode(answers), logits)
    assert form.is_exact
    assert answers['label'].tolist() == labels.tolist()


def test_log_sum_exp_and_loss_are_those_of_temperature_1():
    logits, labels = batch()
    answers = AnswerFormat(20).encode(logits, labels)
    for row, label, answer in zip(logits, labels, answers):
        lse = math.log(sum(math.exp(z) for z in row))
        assert answer['lse'] == pytest.approx(lse, abs=1e-6)
        assert answer['log_prob'] == pytest.approx(float(row[label]) - lse, abs=1e-6)


def test_a_confident_teachers_loss_keeps_its_precision():
    form = AnswerFormat(3, top_k=1, taus=(TAU,))
    answers = form.encode(torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([0]))
    assert form.hard_loss(answers).item() == pytest.approx(2 * math.exp(-30), rel=1e-6)


@pytest.mark.parametrize('top_k', [1, 5, 18])
@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_top_k_is_restored_as_by_hand(top_k, tau):
    logits, labels = batch()
    form = AnswerFormat(20, top_k, taus=(1.0, 4.0))
    restored = form.decode(form.encode(logits, labels), tau)
    expected = [restored_by_hand(row, int(label), top_k, tau) for row, label in zip(logits, labels)]
    torch.testing.assert_close(restored, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_true_class_may_be_among_the_top_or_not():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    form = AnswerFormat(4, top_k=2, taus=(1.0,))
    answers = form.encode(logits, torch.tensor([0, 3]))
    # the first row's two others share log(e + 1), the second row has one other
    share = math.log((math.e + 1) / 2)
    torch.testing.assert_close(
        form.decode(answers, 1.0), torch.tensor([[3.0, 2.0, share, share], [3.0, 2.0, 1.0, 0.0]])
    )


def test_mass_at_tau_is_kept():
    logits, labels = batch()
    form = AnswerFormat(20, top_k=3, taus=(TAU,))
    restored = form.decode(form.encode(logits, labels), TAU)
    torch.testing.assert_close((restored / TAU).logsumexp(1), (logits / TAU).logsumexp(1))


@pytest.mark.parametrize(
    'form, tolerance',
    [
        (AnswerFormat(100, dtype='float16'), 2e-3),
        (AnswerFormat(100, 25, taus=(TAU,)), 3e-2),
        (AnswerFormat(100, 25, 'float16', (TAU,)), 3e-2),
    ],
    ids=str,
)
def test_losses_are_near_and_weights_exact(form, tolerance):
    (student, labels), (teacher, _) = batch(64, 100, seed=1), batch(64, 100, seed=2)
    answers = form.encode(teacher, labels)
    restored = form.decode(answers, TAU)
    torch.testing.assert_close(
        soft_cross_entropy(student, restored, TAU), soft_cross_entropy(student, teacher, TAU), rtol=tolerance, atol=0
    )
    weights = 1 - torch.exp(
        -torch.nn.functional.cross_entropy(student, labels, reduction='none') / form.hard_loss(answers)
    )
    torch.testing.assert_close(weights, wsl_weight(student, teacher, labels), rtol=1e-5, atol=1e-6)


def test_predictions_are_the_largest_logits():
    logits, labels = batch()
    for form in (AnswerFormat(20), AnswerFormat(20, 2, taus=(TAU,))):
        assert form.predictions(form.encode(logits, labels)).tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize(
    'form, size',
    [
        (AnswerFormat(100), 1 + 400 + 12),
        (AnswerFormat(100, dtype='float16'), 1 + 200 + 12),
        (AnswerFormat(100, 10, 'float16', (4.0,)), 1 + 10 + 20 + 4 + 12),
        (AnswerFormat(1000, 25, 'float32', (1.0, 2.0)), 2 + 50 + 100 + 8 + 12),
    ],
    ids=str,
)
def test_size_of_a_record(form, size):
    assert form.layout.itemsize == size


@pytest.mark.parametrize(
    'arguments, match',
    [
        (dict(dtype='bfloat16'), "'float32', 'float16'.*got 'bfloat16'"),
        (dict(top_k=0, taus=(1.0,)), r'in \[1, 18\] for 20 classes, got 0'),
        (dict(top_k=19, taus=(1.0,)), 'got 19; leave it out'),
        (dict(top_k=5), r'temperatures.*got taus=\(\)'),
        (dict(top_k=5, taus=(0.0,)), 'above 0'),
    ],
)
def test_wrong_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        AnswerFormat(20, **arguments)


def test_another_tau_is_refused():
    form = AnswerFormat(20, 5, taus=(2.0, 4.0))
    with pytest.raises(ValueError, match=r'restored at tau in \[2\.0, 4\.0\], not at 3\.0'):
        form.decode(form.encode(*batch()), 3.0)


@pytest.mark.parametrize('dtype, logit', [('float32', math.nan), ('float32', math.inf), ('float16', -1e5)])
def test_logits_that_cannot_be_kept_are_refused(dtype, logit):
    logits, labels = batch()
    logits[3, 4] = logit
    with pytest.raises(ValueError, match=f'not finite in {dtype}'):
        AnswerFormat(20, dtype=dtype).encode(logits, labels)


def test_answers_do_not_depend_on_their_neighbours():
    logits, labels = batch()
    form = AnswerFormat(20, 5, taus=(TAU,))
    alone = np.concatenate([form.encode(logits[[i]], labels[[i]]) for i in range(16)])
    assert form.encode(logits, labels).tobytes() == alone.tobytes()
