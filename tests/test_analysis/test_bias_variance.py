import math

import numpy as np
import pytest

from mmwsl.analysis import bootstrap, decompose, pseudo_values


def log_softmax(logits):
    """Of lists, in plain Python."""
    total = math.log(math.fsum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def reference(predictions, label):
    """Bias and variance of one image, by the definitions: a divergence to the mean prediction, and one from it."""
    classes = range(len(predictions[0]))
    mean = log_softmax([math.fsum(p[c] for p in predictions) / len(predictions) for c in classes])
    divergences = [math.fsum(math.exp(mean[c]) * (mean[c] - p[c]) for c in classes) for p in predictions]
    return -mean[label], math.fsum(divergences) / len(predictions)


def predictions(models=4, images=6, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    logits = 2 * generator.standard_normal((models, images, classes))
    logs = np.array([[log_softmax(image) for image in model] for model in logits.tolist()])
    return logs, generator.integers(classes, size=images)


@pytest.mark.parametrize('shape', [(1, 3, 2), (2, 1, 5), (4, 6, 5)])
def test_parts_are_those_of_the_definition_and_sum_up_to_the_loss(shape):
    logs, target = predictions(*shape)
    parts = decompose(logs, target)
    for image, label in enumerate(target):
        bias, variance = reference(logs[:, image].tolist(), label)
        assert parts.bias[image] == pytest.approx(bias, abs=1e-12)
        assert parts.variance[image] == pytest.approx(variance, abs=1e-12)
        loss = math.fsum(-model[image][label] for model in logs) / len(logs)
        assert parts.loss[image] == pytest.approx(loss) == pytest.approx(bias + variance)


def two_classes(log_odds):
    """Log-probabilities of the classes 0 and 1 from log-odds of class 0. Shape: (..., 2)."""
    return -np.logaddexp(0, np.stack([-log_odds, log_odds], -1))


@pytest.mark.parametrize('mean, spread', [(0.0, 1.0), (2.0, 0.5), (-1.0, 3.0)])
def test_models_of_two_kinds_in_closed_form(mean, spread):
    # half the models give log-odds mean + spread, half mean - spread: their mean prediction has log-odds mean
    log_odds = np.array([mean + spread, mean - spread])[:, None]
    parts = decompose(two_classes(log_odds), np.array([0]))
    bias = math.log1p(math.exp(-mean))
    loss = (math.log1p(math.exp(-mean - spread)) + math.log1p(math.exp(-mean + spread))) / 2
    assert parts.bias[0] == pytest.approx(bias)
    assert parts.variance[0] == pytest.approx(loss - bias)


def gaussian_truth(mean, std):
    """Bias and variance of ever more models with normal log-odds: the mean is known, the loss an integral."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    loss = (weights * np.logaddexp(0, -(mean + std * nodes))).sum() / math.sqrt(2 * math.pi)
    bias = math.log1p(math.exp(-mean))
    return bias, loss - bias


def test_few_models_with_normal_log_odds():
    mean, std, models = 1.0, 1.0, 4
    log_odds = mean + std * np.random.default_rng(0).standard_normal((models, 100_000))
    bias, variance = gaussian_truth(mean, std)
    logs, target = two_classes(log_odds), np.zeros(100_000, int)
    plain, corrected = decompose(logs, target), pseudo_values(logs, target)
    assert corrected.bias.mean() == pytest.approx(bias, rel=0.02)
    assert corrected.variance.mean() == pytest.approx(variance, rel=0.05)
    # as the models' own mean has it: a quarter of the variance is counted as bias
    assert plain.variance.mean() == pytest.approx(0.75 * variance, rel=0.05)
    assert plain.bias.mean() == pytest.approx(bias + 0.25 * variance, rel=0.02)


def test_pseudo_values_are_the_jackknifes():
    logs, target = predictions()
    whole, parts = decompose(logs, target), pseudo_values(logs, target)
    for model in range(len(logs)):
        without = decompose(np.delete(logs, model, 0), target)
        for name in ('bias', 'variance', 'loss'):
            expected = 4 * getattr(whole, name) - 3 * getattr(without, name)
            np.testing.assert_allclose(getattr(parts, name)[model], expected, atol=1e-12)
    np.testing.assert_allclose(parts.bias + parts.variance, parts.loss)


def test_equal_models_have_no_variance():
    logs, target = predictions(models=1)
    parts = pseudo_values(np.repeat(logs.astype(np.float32), 3, 0), target)
    np.testing.assert_allclose(parts.variance, 0, atol=1e-12)


def additive(models=20, images=200, seed=0, row=1.0, column=1.0):
    """Values with mean 0 that vary with the model and with the image."""
    generator = np.random.default_rng(seed)
    return row * generator.standard_normal((models, 1)) + column * generator.standard_normal((1, images))


@pytest.mark.parametrize('row, column', [(1.0, 0.0), (0.0, 4.0), (1.0, 4.0)])
def test_interval_is_as_wide_as_models_and_images_make_it(row, column):
    widths = [
        interval.high - interval.low
        for interval in (bootstrap(additive(seed=seed, row=row, column=column), draws=400) for seed in range(10))
    ]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(row**2 / 20 + column**2 / 200), rel=0.12)


def test_interval_covers_the_truth_as_often_as_it_says():
    intervals = [bootstrap(additive(seed=seed), draws=200) for seed in range(150)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.87 <= covered <= 0.99  # 20 models are few: about 0.94


def test_paired_difference_has_a_narrower_interval():
    first = additive()
    second = first + 0.5 + 0.01 * additive(seed=1)
    interval = bootstrap(second - first)
    assert interval.low < interval.value < interval.high
    assert interval.value == pytest.approx(0.5, abs=0.01) and interval.high - interval.low < 0.02


def test_bootstrap_repeats_and_its_level_counts():
    values = additive()
    assert bootstrap(values) == bootstrap(values)
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values, level=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(
    'logs, target, message',
    [
        (np.zeros((2, 3)), [0, 0], r'shape \(K, N, C\) and target \(N, \), got \(2, 3\)'),
        (np.full((2, 3, 2), math.log(0.5)), [0, 1], r'got \(2, 3, 2\) and \(2,\)'),
        (np.full((2, 2, 2), math.log(0.5)), [0, 2], r'target should lie in \[0, 2\), got 0 to 2'),
        (np.zeros((2, 2, 2)), [0, 1], 'sum to 1, but one sum is exp.0.693.*log_softmax'),
        (np.full((2, 2, 2), math.nan), [0, 1], 'sum to 1, but one sum is exp.nan'),
    ],
)
def test_what_is_no_prediction(logs, target, message):
    with pytest.raises(ValueError, match=message):
        decompose(logs, np.array(target))


def test_one_model_has_no_variance_to_estimate():
    with pytest.raises(ValueError, match='at least two models, got 1'):
        pseudo_values(*predictions(models=1))


def test_bootstrap_of_a_row():
    with pytest.raises(ValueError, match=r'a row for each model and a column for each image, got \(5,\)'):
        bootstrap(np.zeros(5))
