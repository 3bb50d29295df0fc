from math import log

import pytest
import torch

from mmwsl.analysis.calibration import fit_temperature

P = torch.tensor([[8, 4, 2, 2], [1, 1, 12, 2], [4, 4, 4, 4]]) / 16  # of three kinds of images


def drawn():
    """Logits of the probabilities' shape and labels that occur just as often as P says."""
    kinds = torch.arange(3).repeat_interleave(16)
    labels = torch.cat([torch.arange(4).repeat_interleave((16 * row).long()) for row in P])
    return P.double().log()[kinds], labels


def test_worked_by_hand():
    """Three of four are right: 9/10, the probability at temperature 1, has to become 3/4, that of a margin of log 3."""
    found = fit_temperature(torch.tensor([[2 * log(3), 0.0]] * 4), torch.tensor([0, 0, 1, 0]))
    assert found.tau == pytest.approx(2, abs=1e-6) and found.images == 4
    assert found.before == pytest.approx((3 * log(10 / 9) + log(10)) / 4, rel=1e-6)
    assert found.after == pytest.approx(-(3 * log(3 / 4) + log(1 / 4)) / 4, rel=1e-6)


@pytest.mark.parametrize('tau', [0.05, 0.7, 1.0, 3.0, 60.0])
def test_a_known_temperature_is_found(tau):
    log_probs, labels = drawn()
    found = fit_temperature((tau * log_probs + 5).float(), labels)  # a constant changes no probability
    assert found.tau == pytest.approx(tau, rel=1e-4)
    assert found.after == pytest.approx(-float(log_probs.gather(1, labels[:, None]).mean()), rel=1e-6)


def test_blocks_of_images_make_no_difference():
    log_probs, labels = (tensor.repeat_interleave(400, 0) for tensor in drawn())  # 19,200 images, in order of kinds
    found = fit_temperature(2 * log_probs, labels)
    assert found.tau == pytest.approx(2, rel=1e-6) and found.images == 19200


@pytest.mark.parametrize(
    'logits, reason',
    [
        ([[5.0, 0.0], [0.0, 5.0]], 'makes no error on them'),
        ([[0.0, 5.0], [5.0, 0.0]], 'is no better than chance on them'),
        ([[0.0, 0.0], [0.0, 0.0]], 'is no better than chance on them'),
    ],
)
def test_a_network_without_a_best_temperature(logits, reason):
    with pytest.raises(ValueError, match=rf'no temperature in \[0.01, 100.0\] is the best for 2 held-out.*{reason}'):
        fit_temperature(torch.tensor(logits), torch.tensor([0, 1]))
