"""What each loss and each weighting should be: the papers' formulas for one target after the other, in plain Python.

A new part is one line in LOSSES or WEIGHTINGS, and the tests of this folder and of test_weightings hold it against its
line. Examples are multiples of 1/16, which every floating-point type stores exactly, so that all types share one
reference.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

EPSILON = 1e-7
TEACHER_LOSSES = [0.0, 0.25, 0.5, 2.0, 0.125, 1.0, 3.5, 0.75, 0.0625, 1.5, 4.0]  # of eleven images
SHAPES = [(1, 2), (5, 7), (2, 50), (2, 5, 3), (2, 3, 2, 2), (0, 5)]
# rtol and atol of values and of gradients. Half-precision logits are computed in float32, so that only the gradient,
# which takes the logits' own type, is rounded to half precision.
TOLERANCES = {
    torch.float64: (dict(rtol=1e-9, atol=1e-11), dict(rtol=1e-8, atol=1e-9)),
    torch.float32: (dict(rtol=1e-5, atol=5e-6), dict(rtol=1e-5, atol=5e-6)),
    torch.float16: (dict(rtol=1e-5, atol=5e-6), dict(rtol=6e-4, atol=5e-6)),
    torch.bfloat16: (dict(rtol=1e-5, atol=5e-6), dict(rtol=5e-3, atol=5e-6)),
}


# ---- one distribution over classes


def log_sum_exp(values):
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def log_softmax(logits, tau=1.0):
    scaled = [logit / tau for logit in logits]
    log_sum = log_sum_exp(scaled)
    return [logit - log_sum for logit in scaled]


def softmax(logits, tau=1.0):
    return [math.exp(log_p) for log_p in log_softmax(logits, tau)]


def without(values, y):
    return values[:y] + values[y + 1 :]


def cross_entropy(probabilities, log_q):
    return -math.fsum(p * q for p, q in zip(probabilities, log_q, strict=True))


def kl(log_p, log_q):
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))


def entropy(logits, tau):
    return cross_entropy(softmax(logits, tau), log_softmax(logits, tau))


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))


class Decision(NamedTuple):
    """One target among its classes; for a head of sigmoids one class of a target, whose logits are (0, z)."""

    z_s: list[float]
    z_t: list[float]
    scores: list[float]
    kept: bool = True
    image: int = 0

    @property
    def y(self):
        return self.scores.index(1)

    def hard_loss(self, logits, tau=1.0):
        """-log p_y, exact where it is nearly 0; the cross-entropy of scores that mix classes."""
        if 1 not in self.scores:
            return cross_entropy(self.scores, log_softmax(logits, tau))
        odds = log_sum_exp([z / tau for z in without(logits, self.y)]) - logits[self.y] / tau
        return max(odds, 0.0) + math.log1p(math.exp(-abs(odds)))


# ---- losses of a target


def soft_cross_entropy(d, tau):
    return tau**2 * cross_entropy(softmax(d.z_t, tau), log_softmax(d.z_s, tau))


def dkd(d, tau, alpha, beta):
    def true_and_rest(logits):
        log_p = log_softmax(logits, tau)
        return [log_p[d.y], log_sum_exp(without(log_p, d.y))]

    tckd = kl(true_and_rest(d.z_t), true_and_rest(d.z_s))
    nckd = kl(*(log_softmax(without(logits, d.y), tau) for logits in (d.z_t, d.z_s)))
    return tau**2 * (alpha * tckd + beta * nckd)


def nkd(d, tau, gamma):
    n_t, log_n_s = softmax(without(d.z_t, d.y), tau), log_softmax(without(d.z_s, d.y), tau)
    return -softmax(d.z_t)[d.y] * log_softmax(d.z_s)[d.y] + gamma * tau**2 * cross_entropy(n_t, log_n_s)


def pearson(first, second):
    """With what DIST's authors add to the denominator."""
    deviations = [[value - math.fsum(values) / len(values) for value in values] for values in (first, second)]
    norms = [math.sqrt(math.fsum(value**2 for value in values)) for values in deviations]
    return math.fsum(a * b for a, b in zip(*deviations, strict=True)) / (norms[0] * norms[1] + 1e-8)


def dist_inter(d, tau):
    return tau**2 * (1 - pearson(softmax(d.z_s, tau), softmax(d.z_t, tau)))


def dist_intra(decisions, tau):
    """Of the targets kept together."""
    kept = [d for d in decisions if d.kept]
    if not kept:
        return 0.0
    columns_s, columns_t = (
        list(zip(*(softmax(logits, tau) for logits in side), strict=True))
        for side in ([d.z_s for d in kept], [d.z_t for d in kept])
    )
    of_classes = [1 - pearson(s, t) for s, t in zip(columns_s, columns_t, strict=True)]
    return tau**2 * math.fsum(of_classes) / len(of_classes)


def ttm(d, tau):
    log_q = log_softmax(log_softmax(d.z_t), tau)  # of a power of probabilities, normalised
    return kl(log_q, log_softmax(d.z_s))


def standardized(logits):
    mean = math.fsum(logits) / len(logits)
    std = math.sqrt(math.fsum((z - mean) ** 2 for z in logits) / (len(logits) - 1))
    return [(z - mean) / (std + EPSILON) for z in logits]


def on_standardized(loss, d):
    return loss(d._replace(z_s=standardized(d.z_s), z_t=standardized(d.z_t)))


def whole_on_standardized(loss, decisions):
    return loss([d._replace(z_s=standardized(d.z_s), z_t=standardized(d.z_t)) for d in decisions])


# ---- weights of a target


def of_losses(student, teacher):
    return -math.expm1(-student / (teacher + EPSILON))


def wsl(d, teacher_tau=1.0):
    return of_losses(d.hard_loss(d.z_s), d.hard_loss(d.z_t, teacher_tau))


def wsl_of_file(d):
    return of_losses(d.hard_loss(d.z_s), TEACHER_LOSSES[d.image])


def label_free(d):
    answer = d.z_t.index(max(d.z_t))
    return wsl(d._replace(scores=[float(c == answer) for c in range(len(d.z_t))]))


def power_sum(d, tau):
    return math.fsum(math.exp(log_p / tau) for log_p in log_softmax(d.z_t))


def ea(d, tau):
    return (entropy(d.z_t, tau) + entropy(d.z_t, tau) * entropy(d.z_s, tau) / math.log(len(d.z_t))) / 2


def disagreement(d, beta):
    return abs(sigmoid(d.z_t[1]) - sigmoid(d.z_s[1])) ** beta


def is_regularization(d, tau):
    a = softmax(d.z_s)[d.y] - 1
    b = tau * (softmax(d.z_s, tau)[d.y] - softmax(d.z_t, tau)[d.y]) - a
    return abs(b) > abs(a)


def regularization(d, tau, wanted):
    return float(is_regularization(d, tau) == wanted)


# ---- weights of a batch


def each(weight):
    return lambda decisions, tau: [weight(d) for d in decisions]


def each_at_tau(weight):
    return lambda decisions, tau: [weight(d, tau) for d in decisions]


def mean_of(weight):
    def of_batch(decisions, tau):
        weights = [w for w, d in zip(weight(decisions, tau), decisions, strict=True) if d.kept]
        return [math.fsum(weights) / max(len(weights), 1)] * len(decisions)

    return of_batch


def product_of(*weights):
    return lambda decisions, tau: [
        math.prod(factors) for factors in zip(*(weight(decisions, tau) for weight in weights), strict=True)
    ]


def scale_free(decisions, tau):
    """Of the first batch, whose means are the running ones."""
    kept = [d for d in decisions if d.kept]
    if not kept:
        return [wsl(d) for d in decisions]
    mean_s, mean_t = (
        math.fsum(d.hard_loss(logits) for d, logits in side) / len(kept)
        for side in ([(d, d.z_s) for d in kept], [(d, d.z_t) for d in kept])
    )
    return [of_losses(d.hard_loss(d.z_s) / mean_s, d.hard_loss(d.z_t) / mean_t) for d in decisions]


# ---- the parts


class Loss(NamedTuple):
    """A config and its formula; ``whole`` is a further term of the batch as a whole."""

    config: dict[str, Any]
    of_target: Callable
    whole: Callable | None = None
    per_class: bool = False
    needs_classes: bool = False

    @property
    def tau(self):
        return self.config['loss']['tau'] if self.config['type'] == 'Standardized' else self.config['tau']


class Weighting(NamedTuple):
    """A config and its formula for a batch, given the loss's temperature."""

    config: dict[str, Any]
    of_batch: Callable
    per_class: bool = False
    per_image: bool = False
    needs_classes: bool = False


def _standardized(inner):
    return Loss(
        dict(type='Standardized', loss=inner.config),
        partial(on_standardized, inner.of_target),
        inner.whole and partial(whole_on_standardized, inner.whole),
        needs_classes=inner.needs_classes,
    )


SOFT = Loss(dict(type='SoftCrossEntropy', tau=3.0), partial(soft_cross_entropy, tau=3.0))
DKD = Loss(
    dict(type='DKD', tau=4.0, alpha=1.0, beta=8.0), partial(dkd, tau=4.0, alpha=1.0, beta=8.0), needs_classes=True
)
NKD = Loss(dict(type='NKD', tau=2.0, gamma=1.5), partial(nkd, tau=2.0, gamma=1.5), needs_classes=True)
DIST = Loss(dict(type='DIST', tau=2.0, beta=0.5, gamma=0.0), lambda d: 0.5 * dist_inter(d, 2.0))
WHOLE = Loss(dict(type='DIST', tau=2.0, beta=0.5, gamma=3.0), DIST.of_target, lambda ds: 3.0 * dist_intra(ds, 2.0))
TTM = Loss(dict(type='TTM', tau=4.0), partial(ttm, tau=4.0))
LOSSES = {
    'SoftCrossEntropy': SOFT,
    'DKD': DKD,
    'NKD': NKD,
    'DIST, between classes': DIST,
    'DIST': WHOLE,
    'TTM': TTM,
    'Standardized': _standardized(SOFT),
    'Standardized DKD': _standardized(DKD),
    'Standardized NKD': _standardized(NKD),
    'Standardized DIST': _standardized(WHOLE),
    'Standardized TTM': _standardized(TTM),
    'BernoulliKD': Loss(dict(type='BernoulliKD', tau=2.0), partial(soft_cross_entropy, tau=2.0), per_class=True),
}
WSL = Weighting(dict(type='WSLWeighting'), each(wsl))
ENTROPY = Weighting(dict(type='EntropyWeighting', tau=2.0), each(lambda d: entropy(d.z_t, 2.0)))
DISAGREEMENT = Weighting(
    dict(type='DisagreementWeighting', beta=1.5), each(partial(disagreement, beta=1.5)), per_class=True
)
WEIGHTINGS = {
    'Uniform': Weighting(dict(type='UniformWeighting'), each(lambda d: 1.0)),
    'WSL': WSL,
    'WSL, temperature': Weighting(dict(type='WSLWeighting', teacher_tau=2.5), each(partial(wsl, teacher_tau=2.5))),
    'WSL, scale-free': Weighting(dict(type='WSLWeighting', scale_free=True), scale_free),
    'WSL, file': Weighting(
        dict(type='WSLWeighting', teacher_losses='losses.npz'), each(wsl_of_file), per_image=True, needs_classes=True
    ),
    'LabelFreeWSL': Weighting(dict(type='LabelFreeWSLWeighting'), each(label_free)),
    'WTTM': Weighting(dict(type='WTTMWeighting', tau=4.0), each(partial(power_sum, tau=4.0))),
    'Entropy': ENTROPY,
    'Entropy, student': Weighting(dict(type='EntropyWeighting', student=True, tau=3.0), each(partial(ea, tau=3.0))),
    'Disagreement': DISAGREEMENT,
    'Product': Weighting(
        dict(type='ProductWeighting', factors=[ENTROPY.config, WSL.config]), product_of(ENTROPY.of_batch, WSL.of_batch)
    ),
    'Product, disagreement': Weighting(
        dict(type='ProductWeighting', factors=[WSL.config, DISAGREEMENT.config]),
        product_of(WSL.of_batch, DISAGREEMENT.of_batch),
        per_class=True,
    ),
    'Mean': Weighting(dict(type='MeanWeighting'), mean_of(WSL.of_batch)),
    'Mean of entropy': Weighting(dict(type='MeanWeighting', of=ENTROPY.config), mean_of(ENTROPY.of_batch)),
    'Regularization, others': Weighting(
        dict(type='RegularizationWeighting', keep='others'),
        each_at_tau(partial(regularization, wanted=False)),
        needs_classes=True,
    ),
    'Regularization, alone': Weighting(
        dict(type='RegularizationWeighting', keep='regularization'),
        each_at_tau(partial(regularization, wanted=True)),
        needs_classes=True,
    ),
}
PAIRS = [
    (name, of)
    for name, loss in LOSSES.items()
    for of, weighting in WEIGHTINGS.items()
    if not (weighting.per_image if loss.per_class else weighting.per_class)
]


# ---- examples


@cache
def example(shape=(5, 7), kind='indices'):
    """Logits of student and teacher, and a target, which must not be written to.

    Args:
        kind: 'indices', 'some ignored' (-100), 'scores' (as of mixup) or 'labels' (several of a multi-label head).
    """
    generator = torch.Generator().manual_seed(0)
    preds = (2 * torch.randn(2, *shape, generator=generator, dtype=torch.float64)).clamp(-6, 6).mul(16).round() / 16
    classes = torch.randint(shape[1], (2, shape[0], *shape[2:]), generator=generator)
    target = classes[0]
    if kind == 'some ignored':
        target.view(-1)[1::3] = -100
    elif kind == 'scores':
        first, second = (torch.nn.functional.one_hot(c, shape[1]).movedim(-1, 1).double() for c in classes)
        target = 0.75 * first + 0.25 * second
    elif kind == 'labels':
        target = torch.randint(2, shape, generator=generator).double()
    return (*preds, target)


def inputs(shape=(5, 7), kind='indices', dtype=torch.float64, device='cpu'):
    """An example for torch, copied: the student's logits ask for a gradient."""
    preds_S, preds_T, target = example(shape, kind)
    types = (dtype, dtype, target.dtype if target.dtype == torch.int64 else dtype)
    preds_S, preds_T, target = (
        tensor.to(device, of, copy=True) for tensor, of in zip((preds_S, preds_T, target), types, strict=True)
    )
    return preds_S.requires_grad_(), preds_T, target


def samples(size):
    """Data samples of images in another order than the file's."""
    return [SimpleNamespace(metainfo=dict(sample_idx=(7 * place + 3) % len(TEACHER_LOSSES))) for place in range(size)]


def teacher_losses(monkeypatch):
    """Let every file of teacher losses be TEACHER_LOSSES."""
    import numpy as np

    from mmwsl.cache.teacher_losses import TeacherLosses

    table = SimpleNamespace(losses=np.array(TEACHER_LOSSES, np.float32), labels=np.zeros(len(TEACHER_LOSSES), int))
    monkeypatch.setattr(TeacherLosses, 'load', classmethod(lambda cls, path: table))


def class_vectors(tensor):
    """One list of class values for each target, in the order of an index target's elements."""
    return tensor.detach().double().movedim(1, -1).reshape(-1, tensor.shape[1]).tolist()


def decisions_of(preds_S, preds_T, target, per_class=False):
    """Of a batch, in order; with per_class those of a target's classes follow each other."""
    found, places = [], preds_S[0, 0].numel() if len(preds_S) else 1
    classes = preds_S.shape[1]
    targets = class_vectors(target) if target.is_floating_point() else target.flatten().tolist()
    for place, (z_s, z_t, y) in enumerate(zip(class_vectors(preds_S), class_vectors(preds_T), targets, strict=True)):
        kept = y != -100
        scores = y if isinstance(y, list) else [float(max(y, 0) == c) for c in range(classes)]
        image = (7 * (place // places) + 3) % len(TEACHER_LOSSES)
        if per_class:
            found += [
                Decision([0.0, s], [0.0, t], [1 - score, score], kept, image)
                for s, t, score in zip(z_s, z_t, scores, strict=True)
            ]
        else:
            found.append(Decision(z_s, z_t, scores, kept, image))
    return found


@cache
def decisions(shape, kind, per_class):
    return decisions_of(*example(shape, kind), per_class)


# ---- what is expected of an example, without the targets that are ignored: they have 0


@cache
def loss_values(name, shape, kind):
    loss = LOSSES[name]
    return [loss.of_target(d) if d.kept else 0.0 for d in decisions(shape, kind, loss.per_class)]


@cache
def weight_values(name, shape, kind, per_class, tau):
    found = decisions(shape, kind, per_class)
    return [w if d.kept else 0.0 for w, d in zip(WEIGHTINGS[name].of_batch(found, tau), found, strict=True)]


def count(shape, kind):
    """Targets kept, at least 1."""
    return max(sum(d.kept for d in decisions(shape, kind, False)), 1)


def of_targets(values, shape, per_class=False):
    """Values in order as a tensor. Shape: (N, *), or with per_class (N, C, *)."""
    values = torch.tensor(values, dtype=torch.float64)
    if per_class:
        return values.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return values.reshape(shape[0], *shape[2:])


def slope(f, x, step=1e-3):
    """A derivative, by four values; its error is of the order of 1e-12."""
    return (8 * (f(x + step) - f(x - step)) - (f(x + 2 * step) - f(x - 2 * step))) / (12 * step)


def replaced(values, place, value):
    return [*values[:place], value, *values[place + 1 :]]


@cache
def loss_gradient(name, shape, kind):
    """Of each target's loss for its logits. Shape: (N, C, *)."""
    loss, rows = LOSSES[name], []
    for d in decisions(shape, kind, loss.per_class):
        for c in [1] if loss.per_class else range(len(d.z_s)):
            rows.append(slope(partial(_moved, loss.of_target, d, c), d.z_s[c]) if d.kept else 0.0)
    return of_targets(rows, shape, per_class=True)


def _moved(of_target, d, c, z):
    """A target's loss with another logit for class c."""
    return of_target(d._replace(z_s=replaced(d.z_s, c, z)))


@cache
def whole_gradient(name, shape, kind):
    """Of the term of the batch as a whole. Shape: (N, C, *)."""
    found = decisions(shape, kind, False)
    rows = [
        slope(partial(_moved, lambda d, place=place: LOSSES[name].whole(replaced(found, place, d)), d, c), z)
        for place, d in enumerate(found)
        for c, z in enumerate(d.z_s)
    ]
    return of_targets(rows, shape, per_class=True)
