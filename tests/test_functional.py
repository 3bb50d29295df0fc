import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mmwsl import functional

SHAPES = [(6, 5), (2, 5, 3), (2, 4, 3, 2)]
# Far beyond it float32 itself overflows, in the difference of two logits or in a logit / tau.
LARGEST_LOGIT = 2.0**100
# The same examples in every run, and none remembered from the last one.
reproducible = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def example(shape=(6, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    preds_S, preds_T = (2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    return preds_S, preds_T, target


def soft_target(preds, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(preds.shape, generator=generator, dtype=torch.float64).to(preds.dtype)


def logits_losing(loss):
    """Two-class logits whose cross-entropy with class 0 is ``loss``: log(1 + exp(-z)) = loss, solved for z."""
    return torch.tensor([[-math.log(math.expm1(loss)), 0.0]], dtype=torch.float64)


def gradient(loss, preds, upstream=None):
    return torch.autograd.grad(loss, preds, upstream, retain_graph=True)[0]


# ---- numbers worked out by hand


@pytest.mark.parametrize('teacher_loss', [0.2, 0.7, 3.0])
@pytest.mark.parametrize(
    'ratio, expected', [(0.1, 0.095), (0.5, 0.393), (1, 0.632), (2, 0.865), (3, 0.950), (5, 0.993)]
)
def test_weight_depends_on_the_ratio_of_the_losses(ratio, expected, teacher_loss):
    preds_S, preds_T, target = logits_losing(ratio * teacher_loss), logits_losing(teacher_loss), torch.tensor([0])
    weight = functional.wsl_weight(preds_S, preds_T, target).item()
    assert weight == pytest.approx(expected, abs=5e-4)
    assert weight == pytest.approx(1 - math.exp(-ratio), rel=1e-6)


def test_weight_is_1_where_only_the_teacher_has_nothing_to_learn():
    perfect = torch.tensor([[1e3, 0.0]])
    assert functional.hard_loss(perfect, torch.tensor([0])).item() == 0
    assert functional.wsl_weight(torch.zeros(1, 2), perfect, torch.tensor([0])).item() == 1


def test_weight_is_0_where_both_have_nothing_to_learn():
    perfect = torch.tensor([[1e3, 0.0]])
    assert functional.wsl_weight(perfect, 2 * perfect, torch.tensor([0])).item() == 0


def test_example_worked_by_hand():
    # Class 1 of two, tau 2. Student logits (0, ln 4), teacher logits (ln 9, 0).
    # Temperature 1: p_s = (1/5, 4/5), p_t = (9/10, 1/10), so L_s = ln(5/4), L_t = ln 10.
    #     ln(5/4) / ln 10 = 0.22314355 / 2.30258509 = 0.09691001, w = 1 - exp(-0.09691001) = 0.09236232
    # Temperature 2: logits (0, ln 2) and (ln 3, 0), p_s = (1/3, 2/3), p_t = (3/4, 1/4).
    #     H = 3/4 ln 3 + 1/4 ln(3/2) = 0.82395922 + 0.10136628 = 0.92532550
    # Loss: w * 4 * H. Its gradient: w * 2 * (p_s - p_t) = w * (-5/6, 5/6).
    # a = 4/5 - 1 = -1/5. b = 2 * (2/3 - 1/4) + 1/5 = 31/30.
    preds_S = torch.tensor([[0, math.log(4)]], dtype=torch.float64, requires_grad=True)
    preds_T = torch.tensor([[math.log(9), 0]], dtype=torch.float64)
    target = torch.tensor([1])
    near = dict(rtol=1e-6, atol=0)

    assert functional.hard_loss(preds_S, target).item() == pytest.approx(0.22314355)
    assert functional.hard_loss(preds_T, target).item() == pytest.approx(2.30258509)
    assert functional.wsl_weight(preds_S, preds_T, target).item() == pytest.approx(0.09236232)
    assert functional.soft_cross_entropy(preds_S, preds_T, tau=2.0).item() == pytest.approx(4 * 0.92532550)
    loss = functional.wsl_loss(preds_S, preds_T, target, tau=2.0)
    assert loss.item() == pytest.approx(0.34186085)
    expected = 0.09236232 * torch.tensor([[-5 / 6, 5 / 6]], dtype=torch.float64)
    torch.testing.assert_close(gradient(loss, preds_S), expected, **near)
    a, b = functional.bias_and_variance_gradients(preds_S, preds_T, target, tau=2.0)
    assert (a.item(), b.item()) == pytest.approx((-1 / 5, 31 / 30))


def test_hard_loss_of_class_scores_worked_by_hand():
    # p = (1/5, 4/5), scores (1/4, 3/4): 1/4 ln 5 + 3/4 ln(5/4) = 0.40235948 + 0.16735766
    preds, scores = torch.tensor([[0, math.log(4)]]), torch.tensor([[0.25, 0.75]])
    assert functional.hard_loss(preds, scores).item() == pytest.approx(0.56971714)


# ---- gradients


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
def test_gradient_with_the_weight_held_fixed(monkeypatch, shape, tau):
    preds_S, preds_T, target = example(shape)
    weight = functional.wsl_weight(preds_S, preds_T, target)
    # A numerical gradient moves the logits, and the weight with them unless it is a constant.
    monkeypatch.setattr(functional, 'wsl_weight', lambda *args: weight)
    assert torch.autograd.gradcheck(
        lambda preds: functional.wsl_loss(preds, preds_T, target, tau), preds_S.requires_grad_()
    )


@pytest.mark.parametrize('soft', [False, True])
def test_gradient_of_the_hard_loss(soft):
    preds, _, target = example((4, 3))
    target = soft_target(preds) if soft else target
    assert torch.autograd.gradcheck(lambda preds: functional.hard_loss(preds, target), preds.requires_grad_())


@pytest.mark.parametrize('soft', [False, True])
def test_no_gradient_through_the_weight_or_to_the_teacher(soft):
    preds_S, preds_T, target = example()
    target = soft_target(preds_S) if soft else target
    preds_S.requires_grad_()
    preds_T.requires_grad_()
    weight = functional.wsl_weight(preds_S, preds_T, target)
    assert not weight.requires_grad

    loss = functional.wsl_loss(preds_S, preds_T, target)
    unweighted = functional.soft_cross_entropy(preds_S, preds_T)
    torch.testing.assert_close(gradient(loss.sum(), preds_S), gradient(unweighted, preds_S, weight))
    loss.sum().backward()
    assert preds_T.grad is None
    assert not functional.soft_cross_entropy(preds_S.detach(), preds_T).requires_grad


def test_a_student_equal_to_its_teacher_gets_no_gradient():
    preds, _, target = example()
    student = preds.clone().requires_grad_()
    # The ratio of equal losses is 1, so this is no trivial zero: every weight is 1 - 1 / e.
    torch.testing.assert_close(
        functional.wsl_weight(preds, preds, target),
        torch.full((6,), 1 - math.exp(-1), dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )
    loss = functional.wsl_loss(student, preds, target)
    torch.testing.assert_close(gradient(loss.sum(), student), torch.zeros_like(preds))


# ---- invariances


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_a_constant_added_to_all_logits_of_a_target_changes_nothing(shape, soft):
    preds_S, preds_T, target = example(shape)
    target = soft_target(preds_S).softmax(1) if soft else target
    constants = torch.linspace(-50, 50, preds_S[:, :1].numel(), dtype=torch.float64).reshape_as(preds_S[:, :1])
    expected = functional.wsl_loss(preds_S, preds_T, target)
    torch.testing.assert_close(functional.wsl_loss(preds_S + constants, preds_T, target), expected)
    torch.testing.assert_close(functional.wsl_loss(preds_S, preds_T - constants, target), expected)


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_the_order_of_the_classes_does_not_matter(shape, soft):
    preds_S, preds_T, target = example(shape)
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(2))
    renamed = order.argsort()[target]  # class c is found at the place where order has c
    if soft:
        target = soft_target(preds_S)
        renamed = target[:, order]
    torch.testing.assert_close(
        functional.wsl_loss(preds_S[:, order], preds_T[:, order], renamed),
        functional.wsl_loss(preds_S, preds_T, target),
    )


def test_a_dense_target_is_a_batch_of_targets():
    preds_S, preds_T, target = example((2, 4, 3, 2))
    dense = functional.wsl_loss(preds_S, preds_T, target)
    rows_S, rows_T = (preds.movedim(1, -1).reshape(-1, 4) for preds in (preds_S, preds_T))
    torch.testing.assert_close(dense.flatten(), functional.wsl_loss(rows_S, rows_T, target.flatten()))


@pytest.mark.parametrize('shape', SHAPES)
def test_one_hot_scores_equal_indices(shape):
    preds_S, preds_T, target = example(shape)
    one_hot = F.one_hot(target, shape[1]).movedim(-1, 1).double()
    torch.testing.assert_close(
        functional.wsl_loss(preds_S, preds_T, one_hot), functional.wsl_loss(preds_S, preds_T, target)
    )


def test_the_weight_does_not_depend_on_the_temperature():
    preds_S, preds_T, target = example()
    for tau in (0.5, 1.0, 4.0):
        weight = functional.wsl_loss(preds_S, preds_T, target, tau) / functional.soft_cross_entropy(
            preds_S, preds_T, tau
        )
        torch.testing.assert_close(weight, functional.wsl_weight(preds_S, preds_T, target))


finite_logits = st.lists(st.floats(-LARGEST_LOGIT, LARGEST_LOGIT, width=32), min_size=3, max_size=3)


@reproducible
@given(student=finite_logits, teacher=finite_logits, label=st.integers(0, 2), tau=st.floats(0.25, 8.0))
def test_finite_logits_have_a_finite_loss(student, teacher, label, tau):
    preds_S, preds_T = torch.tensor([student], requires_grad=True), torch.tensor([teacher])
    target = torch.tensor([label])
    weight = functional.wsl_weight(preds_S, preds_T, target)
    loss = functional.wsl_loss(preds_S, preds_T, target, tau)
    assert 0 <= weight.item() <= 1
    assert 0 <= loss.item() < math.inf
    assert gradient(loss, preds_S).isfinite().all()


@reproducible
@given(student=finite_logits, teacher=finite_logits, scores=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3))
def test_finite_logits_and_class_scores_have_a_finite_loss(student, teacher, scores):
    preds_S, preds_T, target = torch.tensor([student]), torch.tensor([teacher]), torch.tensor([scores])
    assert 0 <= functional.wsl_weight(preds_S, preds_T, target).item() <= 1
    assert 0 <= functional.wsl_loss(preds_S, preds_T, target).item() < math.inf


# ---- precision


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize(
    'dtype, expected',
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_computed_in_float32(dtype, expected, soft):
    preds_S, preds_T, target = example(dtype=dtype)
    target = soft_target(preds_S) if soft else target
    exact = preds_S.to(expected), preds_T.to(expected), target

    assert functional.hard_loss(preds_S, target).dtype == expected
    assert functional.soft_cross_entropy(preds_S, preds_T).dtype == expected
    for function in (functional.wsl_weight, functional.wsl_loss):
        result = function(preds_S, preds_T, target)
        assert result.dtype == expected
        assert torch.equal(result, function(*exact))
    if not soft:
        for result, wanted in zip(
            functional.bias_and_variance_gradients(preds_S, preds_T, target),
            functional.bias_and_variance_gradients(*exact),
            strict=True,
        ):
            assert result.dtype == expected
            assert torch.equal(result, wanted)


def test_a_teacher_in_half_precision():
    preds_S, preds_T, target = example(dtype=torch.float32)
    loss = functional.wsl_loss(preds_S, preds_T.half(), target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, functional.wsl_loss(preds_S, preds_T.half().float(), target))


# ---- ignored targets


@pytest.mark.parametrize('ignore_index', [-100, 255, 1])
def test_ignored_targets_lose_0(ignore_index):
    preds_S, preds_T, target = example()
    target = torch.where(target == 1, 0, target)
    kept = torch.tensor([True, False, True, True, False, True])
    ignoring = torch.where(kept, target, ignore_index)
    for function in (functional.wsl_weight, functional.wsl_loss):
        result = function(preds_S, preds_T, ignoring, ignore_index=ignore_index)
        assert torch.equal(result, torch.where(kept, function(preds_S, preds_T, target), 0))
    assert torch.equal(
        functional.hard_loss(preds_S, ignoring, ignore_index),
        torch.where(kept, functional.hard_loss(preds_S, target), 0),
    )
    assert torch.equal(functional.kept_targets(ignoring, ignore_index), kept)


def test_class_scores_are_all_kept():
    scores = torch.full((2, 5, 3), -100.0)
    assert torch.equal(functional.kept_targets(scores), torch.ones(2, 3, dtype=torch.bool))


# ---- bias and variance


@pytest.mark.parametrize('tau', [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize('shape', SHAPES)
def test_bias_and_variance_gradients_are_those_of_autograd(shape, tau):
    preds_S, preds_T, target = example(shape)
    preds_S.requires_grad_()
    hard = F.cross_entropy(preds_S, target, reduction='sum')
    soft = tau**2 * F.kl_div((preds_S / tau).log_softmax(1), (preds_T / tau).softmax(1), reduction='sum')
    at_true_class = [gradient(loss, preds_S).gather(1, target.unsqueeze(1)).squeeze(1) for loss in (hard, soft - hard)]
    a, b = functional.bias_and_variance_gradients(preds_S, preds_T, target, tau)
    torch.testing.assert_close(a, at_true_class[0])
    torch.testing.assert_close(b, at_true_class[1])
    assert not a.requires_grad and not b.requires_grad


@pytest.mark.parametrize('ignore_index', [-100, 255])
def test_bias_and_variance_gradients_beside_ignored_targets(ignore_index):
    preds_S, preds_T, target = example()
    expected = functional.bias_and_variance_gradients(preds_S, preds_T, target)
    target[2] = ignore_index
    others = torch.arange(6) != 2
    found = functional.bias_and_variance_gradients(preds_S, preds_T, target, ignore_index=ignore_index)
    for result, wanted in zip(found, expected, strict=True):
        assert torch.equal(result[others], wanted[others])


# ---- the weight alone


def mse(preds_S, preds_T):
    return F.mse_loss(preds_S, preds_T, reduction='none').mean(1)


def l1(preds_S, preds_T):
    return F.l1_loss(preds_S, preds_T, reduction='none').sum(1)


def kl(preds_S, preds_T):
    return F.kl_div(preds_S.log_softmax(1), preds_T.log_softmax(1), reduction='none', log_target=True).sum(1)


def cosine(preds_S, preds_T):
    return 1 - F.cosine_similarity(preds_S, preds_T, dim=1)


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('other_loss', [mse, l1, kl, cosine])
def test_the_weight_weights_any_loss_of_one_value_per_target(other_loss, shape, soft):
    preds_S, preds_T, target = example(shape)
    target = soft_target(preds_S) if soft else target
    preds_S.requires_grad_()
    weight = functional.wsl_weight(preds_S, preds_T, target)
    loss = other_loss(preds_S, preds_T)
    assert weight.shape == loss.shape
    torch.testing.assert_close(gradient((weight * loss).sum(), preds_S), gradient(loss, preds_S, weight))


# ---- errors

LOGITS = torch.zeros(4, 5)
DENSE = torch.zeros(4, 5, 3)
LABELS = torch.zeros(4, dtype=torch.int64)
BAD_LOGITS = [
    (LOGITS.long(), LOGITS, TypeError, r'preds_S should be floating-point logits, got torch\.int64'),
    (LOGITS, LOGITS.int(), TypeError, r'preds_T should be floating-point logits, got torch\.int32'),
    (LOGITS[0], LOGITS, ValueError, r'preds_S should have shape \(N, C\) or \(N, C, \*\), got \(5,\)$'),
    (LOGITS, LOGITS[0], ValueError, r'preds_T should have shape \(N, C\) or \(N, C, \*\), got \(5,\)$'),
    (
        LOGITS,
        torch.zeros(4, 7),
        ValueError,
        'should predict the same classes, got 5 from the student and 7 from the teacher$',
    ),
    (
        LOGITS,
        torch.zeros(3, 5),
        ValueError,
        r'preds_S and preds_T should have the same shape, got \(4, 5\) and \(3, 5\)$',
    ),
    (DENSE, DENSE[..., :2], ValueError, r'should have the same shape, got \(4, 5, 3\) and \(4, 5, 2\)$'),
    (LOGITS, DENSE, ValueError, r'should have the same shape, got \(4, 5\) and \(4, 5, 3\)$'),
]
BAD_TARGETS = [
    (LOGITS, LABELS.int(), TypeError, r'class indices \(int64\) or class scores \(floating point\), got torch\.int32$'),
    (LOGITS, LABELS.bool(), TypeError, r'got torch\.bool$'),
    (
        LOGITS,
        LABELS[:3],
        ValueError,
        r'class indices should have shape \(4,\) for logits of shape \(4, 5\), got \(3,\)$',
    ),
    (LOGITS, LABELS.unsqueeze(1), ValueError, r'should have shape \(4,\) for .* got \(4, 1\)$'),
    (
        DENSE,
        LABELS,
        ValueError,
        r'class indices should have shape \(4, 3\) for logits of shape \(4, 5, 3\), got \(4,\)$',
    ),
    (LOGITS, LABELS.double(), ValueError, r'class scores should have the shape of the logits, \(4, 5\), got \(4,\)$'),
    (LOGITS, torch.zeros(4, 6), ValueError, r'shape of the logits, \(4, 5\), got \(4, 6\)$'),
    (DENSE, LOGITS, ValueError, r'shape of the logits, \(4, 5, 3\), got \(4, 5\)$'),
    (
        LOGITS,
        torch.tensor([0, 5, 0, 7]),
        ValueError,
        r'class indices should lie in \[0, 5\) or be ignore_index=-100, got 5$',
    ),
    (LOGITS, torch.tensor([0, -1, 0, 0]), ValueError, r'should lie in \[0, 5\) or be ignore_index=-100, got -1$'),
    (LOGITS, torch.tensor([0, -100, 255, 0]), ValueError, 'got 255$'),
]


@pytest.mark.parametrize(
    'function',
    [
        lambda preds_S, preds_T: functional.wsl_loss(preds_S, preds_T, LABELS),
        lambda preds_S, preds_T: functional.wsl_weight(preds_S, preds_T, LABELS),
        functional.soft_cross_entropy,
    ],
    ids=['wsl_loss', 'wsl_weight', 'soft_cross_entropy'],
)
@pytest.mark.parametrize('preds_S, preds_T, error, message', BAD_LOGITS)
def test_logits_that_do_not_belong_together(function, preds_S, preds_T, error, message):
    with pytest.raises(error, match=message):
        function(preds_S, preds_T)


@pytest.mark.parametrize(
    'function',
    [
        lambda preds, target: functional.wsl_loss(preds, preds, target),
        lambda preds, target: functional.wsl_weight(preds, preds, target),
        functional.hard_loss,
    ],
    ids=['wsl_loss', 'wsl_weight', 'hard_loss'],
)
@pytest.mark.parametrize('preds, target, error, message', BAD_TARGETS)
def test_targets_that_do_not_belong_to_the_logits(function, preds, target, error, message):
    with pytest.raises(error, match=message):
        function(preds, target)


def test_the_error_of_an_index_names_the_ignore_index():
    with pytest.raises(ValueError, match=r'should lie in \[0, 5\) or be ignore_index=255, got -100$'):
        functional.wsl_loss(LOGITS, LOGITS, LABELS - 100, ignore_index=255)


@pytest.mark.parametrize('tau', [0, -1.0, math.nan, math.inf, -math.inf])
def test_a_temperature_that_is_not_positive(tau):
    with pytest.raises(ValueError, match=f'tau should be a positive number, got {tau}$'):
        functional.soft_cross_entropy(LOGITS, LOGITS, tau)
    with pytest.raises(ValueError, match=f'tau should be a positive number, got {tau}$'):
        functional.wsl_loss(LOGITS, LOGITS, LABELS, tau)


@pytest.mark.parametrize('ignore_index', [-100, 255])
def test_off_the_cpu_indices_are_checked_by_the_device(monkeypatch, ignore_index):
    checks = []
    monkeypatch.setattr(torch, '_assert_async', lambda *args: checks.append(args))
    # A meta tensor has no values: to read one, as a synchronising check does, raises.
    functional.check_target(LOGITS.to('meta'), LABELS.to('meta'), ignore_index)
    ((condition, message),) = checks
    assert condition.is_meta and condition.dtype == torch.bool and condition.shape == ()
    assert message == f'a class index is not in [0, 5) and not {ignore_index}'


@pytest.mark.parametrize('logits', [[[17.0, 0.0]], [[20.0, 0.0]], [[16.5, 0.0]], [[60.0, 0.0]], [[-90.0, 0.0]]])
def test_loss_of_a_confident_network_is_not_lost(logits):
    """log(1 + exp(z_1 - z_0)), where a sum that is nearly 1 has no room for the small one."""
    preds, target = torch.tensor(logits), torch.tensor([0])
    exact = math.log1p(math.exp(logits[0][1] - logits[0][0]))
    assert functional.hard_loss(preds, target).item() == pytest.approx(exact, rel=1e-6)
    a, _ = functional.bias_and_variance_gradients(preds, preds, target)
    assert a.item() == pytest.approx(math.expm1(-exact), rel=1e-6)


def test_gradients_at_a_class_that_is_not_there():
    with pytest.raises(ValueError, match=r'should lie in \[0, 5\) or be ignore_index=-100, got 9'):
        functional.bias_and_variance_gradients(LOGITS, LOGITS, LABELS * 0 + 9)
    with pytest.raises(TypeError, match='target should hold class indices .int64., got torch.float'):
        functional.bias_and_variance_gradients(LOGITS, LOGITS, LOGITS)


def test_gradients_at_an_ignored_target_are_those_of_class_0():
    ignored = functional.bias_and_variance_gradients(LOGITS, LOGITS + 1, LABELS * 0 + 255, ignore_index=255)
    torch.testing.assert_close(ignored, functional.bias_and_variance_gradients(LOGITS, LOGITS + 1, LABELS * 0))


@pytest.mark.parametrize('margin', [0.0, 5.0, 15.0, 25.0, 60.0])
def test_a_confident_target_weighs_the_same_as_index_and_as_scores(margin):
    generator = torch.Generator().manual_seed(0)
    preds_S, preds_T = torch.randn(2, 200, 10, generator=generator)
    target = torch.arange(200) % 10
    for preds, more in ((preds_S, margin), (preds_T, margin + 1)):
        preds[torch.arange(200), target] += more
    scores = F.one_hot(target, 10).float()
    exact = functional.wsl_weight(preds_S.double(), preds_T.double(), target)
    for found in (target, scores):
        torch.testing.assert_close(functional.wsl_weight(preds_S, preds_T, found).double(), exact, rtol=1e-4, atol=1e-5)
