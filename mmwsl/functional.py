r"""The equations as functions of tensors, which need torch alone.

Weighted soft labels (Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff
Perspective", ICLR 2021, arXiv 2102.00650). For a sample with target y, student logits z_s and teacher logits z_t,

.. math::
    L = w \cdot \tau^2 H(\sigma(z_t / \tau), \sigma(z_s / \tau)), \qquad
    w = 1 - \exp(-L_s / L_t), \quad L_s = CE(z_s, y), \; L_t = CE(z_t, y)

where H is the cross-entropy, and L_s and L_t are computed at temperature 1 whatever tau is. Any loss below with one
value per target can be combined with any weight with one value per target.

Shapes: logits are finite, (N, C) or dense (N, C, \*). Targets are either class indices, int64 of shape (N, \*), or
class scores of the logits' shape (label smoothing, mixup, cutmix). Results have one value per target, (N, \*), unless a
function says otherwise, in float32 for half-precision logits and in the logits' own precision otherwise. Losses have a
gradient with respect to the student alone, weights have none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORE_INDEX = -100
REPORTS_LATER = ('cuda', 'meta')  # devices with torch._assert_async
_LARGEST_SUM = 1.02  # of class scores, each of which half precision rounds
_CORRELATION_EPSILON = 1e-8  # as in the code of DIST's authors
EPSILON = 1e-7  # as in the authors' code: keeps the ratio finite if the teacher's loss is 0


def wsl_loss(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 2.0, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    r"""Weighted distillation loss of each target, :math:`w \cdot \tau^2 H`.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits, without gradient. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        tau: Temperature of the soft labels, above 0.
        ignore_index: Class index whose targets have a loss of 0.

    Returns:
        Loss of each target. Shape: (N, \*).

    Raises:
        TypeError: If logits are not floating point, or a target is neither int64 nor floating point.
        ValueError: If shapes do not match, tau is not positive, or an index is not in [0, C).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> wsl_loss(student, teacher, torch.tensor([0]), tau=1.0)  # 0.9101 x ln 2
        tensor([0.6309])
    """
    weight = wsl_weight(preds_S, preds_T, target, ignore_index)
    kept = kept_targets(target, ignore_index)
    return weight * soft_cross_entropy(without_ignored(preds_S, kept), without_ignored(preds_T, kept), tau)


def wsl_weight(preds_S: Tensor, preds_T: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Weight of each target, :math:`1 - \exp(-L_s / L_t)` (Sec. 4 of the paper).

    It is large if the student's loss is large compared with the teacher's: for such a target reducing bias matters, and
    the soft label is trusted. ``weight * other_loss`` weights any other loss with one value per target.

    Args, Raises: As :func:`wsl_loss`.

    Returns:
        Weights in [0, 1], without gradient; 0 if the target is ignored or the student's loss is 0. Shape: (N, \*).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> wsl_weight(student, teacher, torch.tensor([0]))  # 1 - exp(-ln 2 / ln 4/3)
        tensor([0.9101])
    """
    check_logits(preds_S, preds_T)
    with torch.no_grad():
        student = hard_loss(preds_S, target, ignore_index)
        teacher = hard_loss(preds_T, target, ignore_index)
        return weight_of_losses(student, teacher)


def weight_of_losses(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Weight :math:`1 - \exp(-L_s / L_t)` from hard losses at temperature 1, of any shape.

    Examples:
        >>> weight_of_losses(torch.tensor([0.1, 1.0, 5.0]), torch.ones(3))
        tensor([0.0952, 0.6321, 0.9933])
    """
    return torch.expm1(student / (-EPSILON - teacher)).neg_()


def soft_cross_entropy(preds_S: Tensor, preds_T: Tensor, tau: float = 2.0) -> Tensor:
    r"""Unweighted distillation loss of each target, :math:`\tau^2 H(\sigma(z_t / \tau), \sigma(z_s / \tau))`.

    It is the cross-entropy, not the KL divergence: the gradient is the same, and the value is larger by the teacher's
    entropy.

    Args, Raises: As :func:`wsl_loss`.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> soft_cross_entropy(student, teacher, tau=1.0)  # ln 2, since the student is undecided
        tensor([0.6931])
    """
    check_logits(preds_S, preds_T)
    check_temperature(tau)
    soft_labels = F.softmax(at_least_float32(preds_T.detach()) / tau, dim=1)
    return -(tau**2) * (soft_labels * F.log_softmax(at_least_float32(preds_S) / tau, dim=1)).sum(1)


def hard_loss(preds: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    r"""Cross-entropy of each target at temperature 1: :math:`L_s` of the student, :math:`L_t` of the teacher.

    Args:
        preds: Logits. Shape: (N, C, \*).
        target: Class indices, (N, \*), or class scores, (N, C, \*).
        ignore_index: Class index whose targets have a loss of 0.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> hard_loss(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([0]))  # ln 4/3
        tensor([0.2877])
    """
    check_target(preds, target, ignore_index)
    preds = at_least_float32(preds)
    if target.is_floating_point():
        return cross_entropy(preds, target)
    kept = target != ignore_index
    return cross_entropy(without_ignored(preds, kept), target * kept) * kept


def cross_entropy(preds: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each target for arguments that have been checked, precise even if it is nearly 0.

    torch's log-softmax is not: it rounds a sum that is nearly 1. Here the true class, or for class scores the most
    likely class, is left out of that sum.

    Args:
        preds: Logits. Shape: (N, C, *).
        target: Class indices, (N, *), or class scores, (N, C, *).

    Returns:
        Shape: (N, *).
    """
    if target.is_floating_point():
        target, behind = target.to(preds.dtype), preds - preds.detach().amax(1, keepdim=True)
        likeliest = behind == 0
        others = torch.where(likeliest, behind.expm1(), behind.exp()).sum(1) + (likeliest.sum(1) - 1)
        return others.log1p() * target.sum(1) - (target * behind).sum(1)
    others = preds.scatter(1, target.unsqueeze(1), -torch.inf)
    return F.softplus(others.logsumexp(1) - at_target(preds, target), threshold=40)


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """Return the value of each target's class, or its expectation over class scores. Shape: (N, *)."""
    if target.is_floating_point():
        return (target.to(values.dtype) * values).sum(1)
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def bias_and_variance_gradients(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 2.0, ignore_index: int = IGNORE_INDEX
) -> tuple[Tensor, Tensor]:
    r"""Gradients a and b with respect to the true class's logit (Sec. 3 of the paper).

    :math:`a = \partial L_{ce} / \partial z_y = p_{s,1} - 1` reduces bias, and
    :math:`b = \partial (L_{kd} - L_{ce}) / \partial z_y = \tau (p_{s,\tau} - p_{t,\tau}) - (p_{s,1} - 1)` reduces
    variance. A target with |b| > |a| is a *regularization sample*.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices. Shape: (N, \*).
        tau: Temperature of the soft labels, above 0.
        ignore_index: Class index whose targets get a and b of class 0.

    Raises: As :func:`wsl_loss`; TypeError also for class scores, which have no single true class.

    Returns:
        a and b, without gradient. Shape: (N, \*) each.

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> bias_and_variance_gradients(student, teacher, torch.tensor([0]), tau=1.0)  # 0.5 - 1, 0.5 - 0.75 - a
        (tensor([-0.5000]), tensor([0.2500]))
    """
    check_logits(preds_S, preds_T)
    check_temperature(tau)
    if target.is_floating_point():
        raise TypeError(f'target should hold class indices (int64), got {target.dtype}')
    check_target(preds_S, target, ignore_index)
    target = target * (target != ignore_index)

    def log_prob(preds: Tensor, temperature: float) -> Tensor:
        return -cross_entropy(at_least_float32(preds.detach()) / temperature, target)

    a = log_prob(preds_S, 1).expm1()
    b = tau * (log_prob(preds_S, tau).exp() - log_prob(preds_T, tau).exp()) - a
    return a, b


# ---- other losses with one value per target


def dkd_loss(
    preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    r"""Decoupled distillation, :math:`\tau^2 (\alpha \, TCKD + \beta \, NCKD)` (Zhao et al., CVPR 2022, 2203.08679).

    TCKD is the KL divergence of the binary distribution over (true class, all others), NCKD that of the distribution
    among the others, both at temperature tau.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C). Shape: (N, \*).
        tau: Temperature, above 0.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.

    Raises:
        ValueError: If there is only one class.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> dkd_loss(student, teacher, torch.tensor([0]), tau=1.0)  # TCKD alone
        tensor([0.1308])
    """
    check_choice(preds_S.shape[1])
    scaled_S, scaled_T = at_least_float32(preds_S) / tau, at_least_float32(preds_T.detach()) / tau
    margin_S, margin_T = _margin(scaled_S, target), _margin(scaled_T, target)
    true = margin_T.sigmoid() * (F.logsigmoid(margin_T) - F.logsigmoid(margin_S))
    others = (-margin_T).sigmoid() * (F.logsigmoid(-margin_T) - F.logsigmoid(-margin_S))
    log_n_S, log_n_T = _log_softmax_of_others(scaled_S, target), _log_softmax_of_others(scaled_T, target)
    nckd = (log_n_T.exp() * (log_n_T - log_n_S)).sum(1)
    return tau**2 * (alpha * (true + others) + beta * nckd)


def nkd_loss(preds_S: Tensor, preds_T: Tensor, target: Tensor, tau: float = 1.0, gamma: float = 1.5) -> Tensor:
    r"""Normalised distillation (Yang et al., ICCV 2023, arXiv 2303.13005),
    :math:`-p^t_y \log p^s_y - \gamma \tau^2 \sum_{c \ne y} n^t_c \log n^s_c`.

    p is the softmax at temperature 1, n the softmax at temperature tau over all classes except the true class y.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        target: Class indices in [0, C). Shape: (N, \*).
        tau: Temperature of the other classes, above 0.
        gamma: Weight of the other classes.

    Raises: As :func:`dkd_loss`.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> nkd_loss(student, teacher, torch.tensor([0]))  # 0.75 ln 2
        tensor([0.5199])
    """
    check_choice(preds_S.shape[1])
    preds_S, preds_T = at_least_float32(preds_S), at_least_float32(preds_T.detach())
    log_n_S, log_n_T = _log_softmax_of_others(preds_S / tau, target), _log_softmax_of_others(preds_T / tau, target)
    of_true = _margin(preds_T, target).sigmoid() * cross_entropy(preds_S, target)
    return of_true - gamma * tau**2 * (log_n_T.exp() * log_n_S).sum(1)


def dist_inter_loss(preds_S: Tensor, preds_T: Tensor, tau: float = 1.0) -> Tensor:
    r"""DIST's loss on relations between the classes of each target, :math:`\tau^2 (1 - \rho(p^s, p^t))` with Pearson's
    correlation (Huang et al., NeurIPS 2022, arXiv 2205.10536).

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        tau: Temperature, above 0.

    Raises: As :func:`dkd_loss`.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> ranks = torch.tensor([[0.0, 1.0, 2.0]])
        >>> dist_inter_loss(ranks, ranks).abs() < 1e-6  # the same relations
        tensor([True])
    """
    return tau**2 * (1 - _correlation(*_probabilities(preds_S, preds_T, tau), 1))


def dist_intra_loss(preds_S: Tensor, preds_T: Tensor, tau: float = 1.0, kept: Tensor | None = None) -> Tensor:
    r"""DIST's loss on relations between the targets of each class, :math:`\tau^2 (1 - \rho)` with the correlation over
    the batch, averaged over classes (arXiv 2205.10536).

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        tau: Temperature, above 0.
        kept: Mask of the targets that count; None: all. Shape: (N, \*).

    Raises: As :func:`dkd_loss`.

    Returns:
        One value for the batch, 0 where no target counts. A scalar.

    Examples:
        >>> of_class = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> dist_intra_loss(of_class, of_class).abs() < 1e-6
        tensor(True)
    """
    of_class_S, of_class_T = (probs.movedim(1, 0).flatten(1) for probs in _probabilities(preds_S, preds_T, tau))
    mask = torch.ones_like(of_class_S[:1]) if kept is None else kept.reshape(1, -1).to(of_class_S.dtype)
    return tau**2 * (1 - _correlation(of_class_S, of_class_T, 1, mask)).mean() * mask.any()


def ttm_loss(preds_S: Tensor, preds_T: Tensor, tau: float = 4.0) -> Tensor:
    r"""Transformed teacher matching, :math:`KL(q, p^s)` with :math:`q \propto (p^t)^{1/\tau}` and the student at
    temperature 1 (Zheng and Yang, ICLR 2024, arXiv 2402.11148).

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        tau: Temperature of the teacher, above 0.

    Returns:
        Loss of each target. Shape: (N, \*).

    Examples:
        >>> student = torch.zeros(1, 2)  # 0.5 for each class
        >>> teacher = torch.tensor([[3.0, 1.0]]).log()  # 0.75 and 0.25
        >>> ttm_loss(student, teacher, tau=1.0)
        tensor([0.1308])
    """
    log_q = F.log_softmax(at_least_float32(preds_T.detach()) / tau, dim=1)
    return (log_q.exp() * (log_q - F.log_softmax(at_least_float32(preds_S), dim=1))).sum(1)


def bernoulli_loss(preds_S: Tensor, preds_T: Tensor, tau: float = 1.0) -> Tensor:
    r"""Distillation loss of each class of a multi-label head, a separate decision with logits (0, z):
    :math:`\tau^2 BCE(\mathrm{sigmoid}(z_s / \tau), \mathrm{sigmoid}(z_t / \tau))`.

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        tau: Temperature, above 0.

    Returns:
        Loss of each class of each target. Shape: (N, C, \*).

    Examples:
        >>> bernoulli_loss(torch.zeros(1, 2), torch.zeros(1, 2))  # ln 2 each
        tensor([[0.6931, 0.6931]])
    """
    scaled_S, soft_labels = at_least_float32(preds_S) / tau, torch.sigmoid(at_least_float32(preds_T.detach()) / tau)
    return tau**2 * F.binary_cross_entropy_with_logits(scaled_S, soft_labels, reduction='none')


def bernoulli_hard_loss(preds: Tensor, target: Tensor) -> Tensor:
    r"""Binary cross-entropy of each class at temperature 1: :math:`L_s` and :math:`L_t` of a multi-label head.

    Args:
        preds: Logits. Shape: (N, C, \*).
        target: Scores of the classes in [0, 1]. Shape: (N, C, \*).

    Returns:
        Shape: (N, C, \*).

    Examples:
        >>> bernoulli_hard_loss(torch.tensor([3.0]).log(), torch.tensor([1.0]))  # ln 4/3
        tensor([0.2877])
    """
    preds = at_least_float32(preds)
    # exact near 0, where log(sigmoid) rounds a sum that is nearly 1
    return target * F.softplus(-preds, threshold=40) + (1 - target) * F.softplus(preds, threshold=40)


def label_scores(labels: Tensor, classes: int, quality: Tensor | None = None) -> Tensor:
    r"""Convert class indices to target scores of a sigmoid head.

    Args:
        labels: Class indices; the index ``classes`` is background, for which all scores are 0. Shape: (N, \*).
        classes: Number of classes, C.
        quality: Score of the right class, in [0, 1], such as the overlap of a box (GFL, RTMDet). None: 1.
            Shape: (N, \*).

    Returns:
        Scores in [0, 1]. Shape: (N, C, \*).

    Examples:
        >>> label_scores(torch.tensor([1, 2]), classes=2)  # the second target is background
        tensor([[0., 1.],
                [0., 0.]])
    """
    right = torch.ones_like(labels, dtype=torch.float32) if quality is None else quality
    right = right * (labels < classes)  # background writes its 0 to the last class
    scores = right.new_zeros(len(labels), classes, *labels.shape[1:])
    return scores.scatter_(1, labels.clamp(max=classes - 1).unsqueeze(1), right.unsqueeze(1))


def standardized(preds: Tensor) -> Tensor:
    r"""Standardise logits over the classes to mean 0 and standard deviation 1 (Sun et al., CVPR 2024, 2403.01427).

    Args:
        preds: Logits. Shape: (N, C, \*).

    Raises: As :func:`dkd_loss`.

    Returns:
        Shape: (N, C, \*).

    Examples:
        >>> standardized(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[-1.0000,  0.0000,  1.0000]])
    """
    check_choice(preds.shape[1])
    preds = at_least_float32(preds)
    return (preds - preds.mean(1, keepdim=True)) / (preds.std(1, keepdim=True) + EPSILON)


# ---- other weights with one value per target


@torch.no_grad()
def wttm_weight(preds_T: Tensor, tau: float = 4.0) -> Tensor:
    r"""Softness of the teacher's prediction, :math:`\sum_c (p^t_c)^{1/\tau}`, from 1 (one-hot) to
    :math:`C^{1 - 1/\tau}` (uniform) (arXiv 2402.11148).

    Args:
        preds_T: Teacher logits. Shape: (N, C, \*).
        tau: Temperature, above 0.

    Returns:
        Shape: (N, \*).

    Examples:
        >>> wttm_weight(torch.zeros(1, 4), tau=2.0)  # 4 x (1/4)^(1/2)
        tensor([2.])
    """
    return (F.log_softmax(at_least_float32(preds_T), dim=1) / tau).exp().sum(1)


@torch.no_grad()
def entropy(preds: Tensor, tau: float = 1.0) -> Tensor:
    r"""Entropy of a prediction in nats; the teacher's is the weight of ER-KD (arXiv 2311.13621).

    Args:
        preds: Logits. Shape: (N, C, \*).
        tau: Temperature, above 0.

    Returns:
        Shape: (N, \*).

    Examples:
        >>> entropy(torch.zeros(1, 4))  # ln 4
        tensor([1.3863])
    """
    log_probs = F.log_softmax(at_least_float32(preds) / tau, dim=1)
    return -(log_probs.exp() * log_probs).sum(1)


def entropy_weight(entropy_S: Tensor, entropy_T: Tensor, classes: int) -> Tensor:
    r"""EA-KD's weight, :math:`(H_t + H_t H_s / H_{max}) / 2` with :math:`H_{max} = \ln C` (arXiv 2311.13621).

    Args:
        entropy_S: Entropy of the student's prediction, in nats. Shape: (N, \*).
        entropy_T: Entropy of the teacher's prediction, in nats. Shape: (N, \*).
        classes: Number of classes, C.

    Raises: As :func:`dkd_loss`.

    Returns:
        Shape: (N, \*).

    Examples:
        >>> entropy_weight(torch.tensor([0.0]), torch.tensor([1.0]), classes=4)
        tensor([0.5000])
    """
    check_choice(classes)
    return entropy_T * (1 + entropy_S / math.log(classes)) / 2


@torch.no_grad()
def disagreement(preds_S: Tensor, preds_T: Tensor, beta: float = 1.0) -> Tensor:
    r"""Difference of teacher and student on each class, :math:`|p^t - p^s|^\beta` with sigmoid probabilities (BCKD,
    ICCV 2023; CrossKD, CVPR 2024).

    Args:
        preds_S: Student logits. Shape: (N, C, \*).
        preds_T: Teacher logits. Shape: (N, C, \*).
        beta: Exponent, at least 0.

    Returns:
        Shape: (N, C, \*).

    Examples:
        >>> disagreement(torch.zeros(1, 1), torch.tensor([[3.0]]).log())  # 0.75 - 0.5
        tensor([[0.2500]])
    """
    return (torch.sigmoid(at_least_float32(preds_T)) - torch.sigmoid(at_least_float32(preds_S))).abs() ** beta


def _margin(preds: Tensor, target: Tensor) -> Tensor:
    """Logit of the true class against all others together: the log-odds of its probability. Shape: (N, *)."""
    others = preds.scatter(1, target.unsqueeze(1), -torch.inf)
    return at_target(preds, target) - others.logsumexp(1)


def _log_softmax_of_others(preds: Tensor, target: Tensor) -> Tensor:
    """Log-softmax over all classes except the true one, which gets 0. Shape: (N, C, *)."""
    others = preds.scatter(1, target.unsqueeze(1), -torch.inf)
    return _without(F.log_softmax(others, dim=1), target)


def _without(values: Tensor, target: Tensor) -> Tensor:
    """Values with that of the true class replaced by 0. Shape: (N, C, *)."""
    return values.scatter(1, target.unsqueeze(1), 0.0)


def _probabilities(preds_S: Tensor, preds_T: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    check_choice(preds_S.shape[1])
    return (
        F.softmax(at_least_float32(preds_S) / tau, dim=1),
        F.softmax(at_least_float32(preds_T.detach()) / tau, dim=1),
    )


def _correlation(first: Tensor, second: Tensor, dim: int, mask: Tensor | float = 1.0) -> Tensor:
    """Pearson's correlation along dim, of the values that the mask keeps."""
    count = mask.sum(dim, keepdim=True).clamp(min=1) if isinstance(mask, Tensor) else first.shape[dim]
    first, second = ((values - (values * mask).sum(dim, keepdim=True) / count) * mask for values in (first, second))
    return (first * second).sum(dim) / (first.norm(dim=dim) * second.norm(dim=dim) + _CORRELATION_EPSILON)


# ---- checks and helpers


def without_ignored(preds: Tensor, kept: Tensor) -> Tensor:
    """Return logits with 0 for ignored targets, so that NaN and infinity there reach no loss. Shape: as preds."""
    return torch.where(kept.unsqueeze(1), preds, torch.zeros((), dtype=preds.dtype, device=preds.device))


def kept_targets(target: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the mask of the targets that count. Shape: (N, *).

    Examples:
        >>> kept_targets(torch.tensor([3, -100]))
        tensor([ True, False])
    """
    if target.is_floating_point():
        return torch.ones_like(target[:, 0], dtype=torch.bool)
    return target != ignore_index


def may_read_values(tensor: Tensor) -> bool:
    """Whether a check may read a tensor's values.

    It may not if the host would wait for the device, or the graph of torch.compile would break. The check is then made
    asynchronously, with ``torch._assert_async``.
    """
    return tensor.device.type not in REPORTS_LATER and not torch.compiler.is_compiling()


def check_logits(preds_S: Tensor, preds_T: Tensor) -> None:
    """Raise TypeError or ValueError unless both are logits of the same samples over the same classes."""
    for name, preds in (('preds_S', preds_S), ('preds_T', preds_T)):
        if not preds.is_floating_point():
            raise TypeError(f'{name} should be floating-point logits, got {preds.dtype}')
        if preds.dim() < 2:
            raise ValueError(f'{name} should have shape (N, C) or (N, C, *), got {tuple(preds.shape)}')
    if preds_S.shape[1] != preds_T.shape[1]:
        raise ValueError(
            f'student and teacher should predict the same classes, got {preds_S.shape[1]} from the '
            f'student and {preds_T.shape[1]} from the teacher'
        )
    if preds_S.shape != preds_T.shape:
        raise ValueError(
            f'preds_S and preds_T should have the same shape, got {tuple(preds_S.shape)} and {tuple(preds_T.shape)}'
        )


def check_target(
    preds: Tensor, target: Tensor, ignore_index: int = IGNORE_INDEX, background: bool = False, later: bool = True
) -> None:
    """Raise TypeError or ValueError unless target holds indices, or scores, of the logits' classes.

    On CUDA the range of indices is checked asynchronously, so that the host does not wait.

    Args:
        preds: Logits. Shape: (N, C, *).
        target: Class indices, (N, *), or class scores, (N, C, *).
        ignore_index: Class index that is allowed as well.
        background: Whether the index C is allowed as well.
        later: Whether to start the asynchronous check; otherwise the caller does so (:func:`assert_classes`).
    """
    if target.is_floating_point():
        if target.shape != preds.shape:
            raise ValueError(
                f'class scores should have the shape of the logits, {tuple(preds.shape)}, got {tuple(target.shape)}'
            )
        return
    if target.dtype != torch.int64:
        raise TypeError(
            f'target should hold class indices (int64) or class scores (floating point), got {target.dtype}'
        )
    expected = (preds.shape[0], *preds.shape[2:])
    if tuple(target.shape) != expected:
        raise ValueError(
            f'class indices should have shape {expected} for logits of shape {tuple(preds.shape)}, got '
            f'{tuple(target.shape)}'
        )
    indices = preds.shape[1] + background
    if not may_read_values(target):
        if later:
            assert_classes(target.masked_fill(target == ignore_index, 0), indices, ignore_index)
        return
    if target.numel() == 0 or _all_below(target, indices):
        return
    valid = ((target >= 0) & (target < indices)) | (target == ignore_index)
    if not valid.all():
        raise ValueError(
            f'class indices should lie in [0, {indices}) or be ignore_index={ignore_index}, got '
            f'{target[~valid][0].item()}'
        )


def assert_classes(target: Tensor, classes: int, ignore_index: int = IGNORE_INDEX) -> None:
    """Check asynchronously, on a device or in a compiled graph, that indices are in [0, classes).

    Args:
        target: Class indices, with 0 in place of ignore_index. Any shape.
        classes: Number of allowed indices.
        ignore_index: The original index, for the message.
    """
    torch._assert_async(
        (target.clamp(0, classes - 1) == target).all(), f'a class index is not in [0, {classes}) and not {ignore_index}'
    )


def _all_below(target: Tensor, num_classes: int) -> bool:
    """Whether all indices are in [0, num_classes)."""
    lowest, highest = target.aminmax()
    return bool(lowest >= 0) and bool(highest < num_classes)


def check_single_label(target: Tensor) -> None:
    """Raise ValueError for class scores that are negative or do not sum to 1: several labels at once, or none.

    On CUDA the check is asynchronous and never blocks the host.
    """
    if not target.is_floating_point() or target.numel() == 0:
        return
    smallest, largest = target.detach().sum(1, dtype=torch.float32).aminmax()
    valid = (smallest >= 2 - _LARGEST_SUM) & (largest <= _LARGEST_SUM) & (target.detach().amin() >= 0)
    message = 'class scores should be at least 0 and sum to 1 for each target, as with mixup or label smoothing'
    if not may_read_values(target):
        torch._assert_async(valid, message)
    elif not valid:  # also for NaN
        raise ValueError(
            f'{message}, got sums from {smallest.item():.4g} to {largest.item():.4g}. For a multi-label head, use '
            "mmwsl.WeightedLoss with loss=dict(type='BernoulliKD')"
        )


def check_label_scores(target: Tensor) -> None:
    """Raise ValueError for scores of separate decisions outside [0, 1].

    On CUDA the check is asynchronous and never blocks the host.
    """
    if not target.is_floating_point() or target.numel() == 0:
        return
    lowest, highest = target.detach().aminmax()
    valid = (lowest >= 0) & (highest <= 1)  # false for NaN
    if not may_read_values(target):
        torch._assert_async(valid, 'label scores should lie in [0, 1]')
    elif not valid:
        raise ValueError(
            f'label scores should lie in [0, 1], got {lowest.item():.4g} to {highest.item():.4g}: name '
            'each label of an image once, and leave out labels that are neither right nor wrong'
        )


def check_choice(classes: int) -> None:
    """Raise ValueError unless there are several classes to choose from."""
    if classes < 2:
        raise ValueError(
            f'relations among classes need at least 2 classes, got {classes}. For a single logit (yes or no) '
            "use loss=dict(type='BernoulliKD')"
        )


def check_temperature(tau: float) -> None:
    """Raise ValueError unless tau is a positive, finite number."""
    if not 0 < tau < float('inf'):
        raise ValueError(f'tau should be a positive number, got {tau}')


def at_least_float32(preds: Tensor) -> Tensor:
    """Convert half-precision values to float32; others are returned unchanged."""
    return preds.float() if preds.dtype in (torch.float16, torch.bfloat16) else preds
