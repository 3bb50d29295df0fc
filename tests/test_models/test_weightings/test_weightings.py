"""Every weighting against its line in tests/test_models/test_losses/references.py."""

import copy
import io
import math
import threading

import pytest
import torch

from mmwsl.models.losses import WeightedLoss, WSLLoss
from mmwsl.models.weightings.controls import permuted
from tests.test_models.test_losses.references import (
    LOSSES,
    SHAPES,
    TEACHER_LOSSES,
    TOLERANCES,
    WEIGHTINGS,
    decisions,
    example,
    inputs,
    is_regularization,
    of_losses,
    of_targets,
    samples,
    teacher_losses,
    weight_values,
)

CARRIERS = ('SoftCrossEntropy', 'TTM', 'BernoulliKD')  # one computes losses on its way, one does not, one is per class
CASES = [
    (carrier, name)
    for carrier in CARRIERS
    for name, weighting in WEIGHTINGS.items()
    if not (weighting.per_image if LOSSES[carrier].per_class else weighting.per_class)
]


@pytest.fixture(autouse=True)
def _file(monkeypatch):
    teacher_losses(monkeypatch)


def assert_near(actual, expected, **tolerance):
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected, dtype=torch.float64), **tolerance)


def kinds_of(carrier, name):
    scores = [] if WEIGHTINGS[name].needs_classes else ['scores']
    return ['indices', 'some ignored', *scores, *(['labels'] if LOSSES[carrier].per_class else [])]


def applied(carrier, name, shape, kind, dtype=torch.float64):
    """A loss that was called once; under its ``last_call`` are the weights."""
    loss = WeightedLoss(LOSSES[carrier].config, WEIGHTINGS[name].config)
    loss(*inputs(shape, kind, dtype), data_samples=samples(shape[0]))
    return loss


# ---- against the reference


@pytest.mark.parametrize(('carrier', 'name'), CASES)
def test_weight_of_each_target(carrier, name):
    loss, per_image = LOSSES[carrier], WEIGHTINGS[name].per_image
    for shape in [shape for shape in SHAPES if len(shape) == 2 or not per_image]:
        for kind in kinds_of(carrier, name):
            expected = of_targets(weight_values(name, shape, kind, loss.per_class, loss.tau), shape, loss.per_class)
            for dtype in TOLERANCES if shape == (5, 7) else [torch.float64]:
                call = applied(carrier, name, shape, kind, dtype).last_call
                assert not call.weight.requires_grad
                assert call.weight.dtype == (dtype if dtype == torch.float64 else torch.float32)
                assert_near(call.weight.expand(expected.shape) * call.batch.kept, expected, **TOLERANCES[dtype][0])


@pytest.mark.parametrize(('carrier', 'name'), CASES)
def test_weights_of_logits_of_ten_thousand_are_finite(carrier, name):
    logits = torch.tensor([[10240.0, -10240.0, 0.0], [-10240.0, 10240.0, 0.0], [-10240.0, -10240.0, 10240.0]])
    target = torch.tensor([1, 1, 2])
    loss = WeightedLoss(LOSSES[carrier].config, WEIGHTINGS[name].config)
    for dtype in TOLERANCES:
        big = logits.to(dtype)
        for preds_S, preds_T in ((big, big), (big, big.flip(1)), (big.flip(1), big), (0 * big, big), (big, 0 * big)):
            loss(preds_S, preds_T, target, data_samples=samples(3))
            assert loss.last_call.weight.isfinite().all() and (loss.last_call.weight >= 0).all()


# ---- statistics


def percentile(values, percent):
    """The value in the place that is nearest."""
    return sorted(values)[round(percent * (len(values) - 1) / 100)] if values else 0.0


@pytest.mark.parametrize(('carrier', 'name'), CASES)
def test_statistics_against_the_reference(carrier, name):
    loss = LOSSES[carrier]
    for shape in ((5, 7), (2, 5, 3)) if not WEIGHTINGS[name].per_image else ((5, 7),):
        for kind in kinds_of(carrier, name):
            found = decisions(shape, kind, loss.per_class)
            weights = [
                w
                for w, d in zip(weight_values(name, shape, kind, loss.per_class, loss.tau), found, strict=True)
                if d.kept
            ]
            statistics = applied(carrier, name, shape, kind).statistics
            assert ('kl' in statistics) == (carrier != 'TTM')
            statistics.pop('kl', None)
            assert_near(statistics.pop('wsl_weight'), math.fsum(weights) / len(weights))
            for percent in (10, 50, 90):
                assert_near(statistics.pop(f'wsl_weight_p{percent}'), percentile(weights, percent))
            if kind != 'scores':
                share = [is_regularization(d, loss.tau) for d in found if d.kept]
                assert statistics.pop('regularization_share').item() == pytest.approx(sum(share) / len(share))
            elif loss.per_class:  # each class has its outcome, even where it is not 0 or 1
                statistics.pop('regularization_share')
            if loss.per_class:
                values = [w * loss.of_target(d) for w, d in zip(weights, [d for d in found if d.kept], strict=True)]
                right = [d.scores[1] > 0 for d in found if d.kept]
                for sign, name_of_sign in ((True, 'positive'), (False, 'negative')):
                    of_sign = [w for w, positive in zip(weights, right, strict=True) if positive is sign]
                    assert_near(statistics.pop(f'wsl_weight_{name_of_sign}'), math.fsum(of_sign) / max(1, len(of_sign)))
                negatives = math.fsum(v for v, positive in zip(values, right, strict=True) if not positive)
                assert_near(statistics.pop('negative_share'), negatives / math.fsum(values) if any(values) else 0.0)
            assert not statistics


LOG_3 = math.log(3)
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # 0.1308 nats: a teacher sure by 3 to 1, and a guess
KL_OF_LOSSES = {
    'one temperature': (dict(type='SoftCrossEntropy', tau=1.0), [[LOG_3, 0.0]], KL),
    'another': (dict(type='SoftCrossEntropy', tau=2.0), [[2 * LOG_3, 0.0]], KL),
    'two targets, one ignored': (dict(type='SoftCrossEntropy', tau=1.0), [[LOG_3, 0.0], [50.0, 0.0]], KL),
    'standardised': (  # -1 and 1 over their standard deviation, the square root of 2
        dict(type='Standardized', loss=dict(type='SoftCrossEntropy', tau=math.sqrt(2) / LOG_3)),
        [[7.0, 1.0]],
        KL,
    ),
    'decisions': (dict(type='BernoulliKD', tau=2.0), [[2 * LOG_3, 2 * LOG_3]], KL),
    'decisions as one': (dict(type='BernoulliKD', tau=2.0, per_class=False), [[2 * LOG_3, 2 * LOG_3]], 2 * KL),
}


@pytest.mark.parametrize('case', KL_OF_LOSSES)
def test_kl_by_hand(case):
    """Of a student that guesses, and of one that answers as its teacher: the loss itself reaches 0 in none of these."""
    config, logits, expected = KL_OF_LOSSES[case]
    weighting = dict(type='WSLWeighting') if config.get('per_class', True) else None
    loss, teacher = WeightedLoss(config, weighting, loss_weight=3.0), torch.tensor(logits, dtype=torch.float64)
    target = torch.tensor([0, -100][: len(teacher)])
    loss(torch.zeros_like(teacher), teacher, target)
    assert_near(loss.statistics['kl'], expected, rtol=1e-5, atol=0)  # 1e-7 is added to a standard deviation
    value = loss(teacher.clone(), teacher, target)
    assert value > 0 and loss.statistics['kl'].item() == pytest.approx(0, abs=1e-6)


def test_a_call_that_lets_the_teachers_logits_go_knows_no_kl():
    loss = WSLLoss()
    loss(*example((5, 7)))
    known = loss.statistics
    loss.last_call.release()
    known.pop('kl')
    assert loss.statistics == known


def test_percentiles_of_many_targets_are_those_of_every_kth():
    preds_S, preds_T = torch.randn(2, 2**15 + 2, 3, generator=torch.Generator().manual_seed(0))
    loss = WSLLoss()
    loss(preds_S, preds_T, torch.arange(len(preds_S)) % 3)
    weights = loss.last_call.weight[::2].tolist()
    assert len(weights) == 2**14 + 1
    for percent in (10, 50, 90):
        assert loss.statistics[f'wsl_weight_p{percent}'].item() == percentile(weights, percent)


def test_one_loss_for_two_heads_knows_each_call():
    loss = WeightedLoss(dict(type='DKD'), dict(type='WSLWeighting'))
    first, second = example((5, 7)), example((2, 5, 3))
    loss(*first)
    call, expected = loss.last_call, dict(loss.statistics)
    loss(*second)
    assert call.statistics() == expected
    assert loss.statistics['wsl_weight'] != expected['wsl_weight'] and loss.last_call.weight.shape == (2, 3)


def test_two_threads_have_a_last_call_each():
    loss, both_called, found = WSLLoss(), threading.Barrier(2, timeout=60), {}

    def run(shape):
        loss(*example(shape))
        both_called.wait()
        found[shape] = loss.last_call.weight.shape, loss.statistics['wsl_weight'].item()

    threads = [threading.Thread(target=run, args=(shape,)) for shape in ((5, 7), (2, 5, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shape, (of_call, mean) in found.items():
        expected = weight_values('WSL', shape, 'indices', False, 2.0)
        assert of_call == (shape[0], *shape[2:]) and mean == pytest.approx(math.fsum(expected) / len(expected))
    assert loss.last_call is None  # of this thread


@pytest.mark.parametrize(('carrier', 'name'), CASES)
def test_a_copy_knows_no_call_and_no_graph_and_computes_the_same(carrier, name):
    loss = applied(carrier, name, (5, 7), 'indices')
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    for twin in (copy.deepcopy(loss), torch.load(file, weights_only=False)):
        assert twin.last_call is None and twin.statistics == {} and twin.sample_terms == {}
        arguments = dict(data_samples=samples(5))
        loss.eval(), twin.eval()  # running means stay where they are
        torch.manual_seed(7)
        expected = loss(*example(), **arguments)
        assert torch.equal(twin(*example(), **arguments), expected)
        assert torch.equal(twin.last_call.weight, loss.last_call.weight)


# ---- nothing waits for a device


@pytest.mark.parametrize(('carrier', 'name'), [*CASES, ('SoftCrossEntropy', 'Shuffled'), ('BernoulliKD', 'Shuffled')])
def test_nothing_waits_for_a_device(carrier, name):
    """A meta tensor has no values: to read one, which on CUDA waits for the device, raises."""
    config = dict(type='ShuffledWeighting') if name == 'Shuffled' else WEIGHTINGS[name].config
    loss = WeightedLoss(LOSSES[carrier].config, config).to('meta')
    preds_S, preds_T, target = inputs((5, 7), 'indices', torch.float32, 'meta')
    loss(preds_S, preds_T, target, data_samples=samples(5)).backward()
    assert preds_S.grad.is_meta
    assert all(value.is_meta for value in loss.statistics.values())


@pytest.mark.parametrize('carrier', LOSSES)
def test_no_loss_waits_for_a_device(carrier):
    preds_S, preds_T, target = inputs((2, 5, 3), 'indices', torch.float32, 'meta')
    WeightedLoss(LOSSES[carrier].config, dict(type='EntropyWeighting'))(preds_S, preds_T, target).backward()
    assert preds_S.grad.is_meta


# ---- scale-free


def means_of(*batches):
    """Running means of L_s and L_t after some batches, by hand: each leaves 3/4 of what was before."""
    sums, filled = [0.0, 0.0], 0.0
    for kept in batches:
        if kept:
            means = [
                math.fsum(d.hard_loss(logits) for d, logits in side) / len(kept)
                for side in ([(d, d.z_s) for d in kept], [(d, d.z_t) for d in kept])
            ]
            sums = [0.75 * old + 0.25 * new for old, new in zip(sums, means, strict=True)]
            filled = 0.75 * filled + 0.25
    return [value / filled for value in sums]


def kept_of(shape, kind):
    return [d for d in decisions(shape, kind, False) if d.kept]


def scale_free_loss():
    return WeightedLoss(dict(type='TTM'), dict(type='WSLWeighting', scale_free=True, momentum=0.75))


def weights_under(means, found):
    return [of_losses(d.hard_loss(d.z_s) / means[0], d.hard_loss(d.z_t) / means[1]) for d in found]


def test_running_means_follow_the_batches_in_training_alone():
    loss, batches = scale_free_loss(), [((5, 7), 'indices'), ((2, 5, 3), 'some ignored')]
    for shape, kind in batches:
        loss(*example(shape, kind))
    means = means_of(*(kept_of(*batch) for batch in batches))
    found = decisions((2, 5, 3), 'some ignored', False)
    kept = torch.tensor([d.kept for d in found])
    expected = [w for w, d in zip(weights_under(means, found), found) if d.kept]
    assert_near(loss.last_call.weight.flatten()[kept], expected)
    before = loss.sample_weighting.running.clone()
    loss(*example((5, 7))[:2], torch.full((5,), -100))  # no target is kept
    assert torch.equal(loss.sample_weighting.running, before)
    loss.eval()
    loss(*example((5, 7)))
    assert torch.equal(loss.sample_weighting.running, before)
    assert_near(loss.last_call.weight, weights_under(means, decisions((5, 7), 'indices', False)))


def test_running_means_are_part_of_a_checkpoint():
    loss = scale_free_loss()
    loss(*example((5, 7)))
    state = loss.state_dict()
    assert list(state) == ['sample_weighting.running']
    restored = scale_free_loss()
    restored.load_state_dict(state)
    for twin in (loss, restored):
        twin(*example((2, 5, 3)))
    assert torch.equal(restored.last_call.weight, loss.last_call.weight)


def test_before_the_first_batch_losses_stay_as_they_are():
    loss = scale_free_loss().eval()
    loss(*example())
    assert_near(loss.last_call.weight, weight_values('WSL', (5, 7), 'indices', False, 1.0))


def test_a_teacher_without_any_loss_leaves_the_weight_finite():
    sure = torch.tensor([[300.0, 0.0], [300.0, 0.0]])  # L_t underflows to 0, and so does its mean
    loss = scale_free_loss()
    loss(torch.zeros(2, 2), sure, torch.tensor([0, 0]))
    assert loss.last_call.weight.tolist() == [1, 1]


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    loss = scale_free_loss()
    for batch in (((5, 7), 'indices'), ((2, 5, 3), 'some ignored'))[rank], ((5, 7), 'indices'):
        loss(*example(*batch))
    ignored = torch.full((5,), -100) if rank else example((5, 7))[2]
    loss(*example((5, 7))[:2], ignored)  # one of the two has no target
    torch.save(loss.sample_weighting.running, f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_means_of_both(tmp_path):
    torch.multiprocessing.start_processes(_one_of_two, (str(tmp_path),), nprocs=2, start_method='fork')
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert torch.equal(first, second)
    here = kept_of((5, 7), 'indices')
    together = [here + kept_of((2, 5, 3), 'some ignored'), here + here, here]
    assert_near(first[:2] / first[2], means_of(*together))


# ---- shuffled


def shuffled(shape=(64, 5), kind='some ignored', of=None):
    loss = WeightedLoss(dict(type='TTM'), dict(type='ShuffledWeighting', of=of))
    loss(*example(shape, kind))
    return loss


@pytest.mark.parametrize(('of', 'name'), [(None, 'WSL'), (WEIGHTINGS['Entropy'].config, 'Entropy')])
def test_shuffled_weights_are_those_of_the_targets_kept(of, name):
    call = shuffled(of=of).last_call
    kept = call.batch.kept
    expected = of_targets(weight_values(name, (64, 5), 'some ignored', False, 1.0), (64, 5))[kept]
    assert_near(call.weight[kept].sort().values, expected.sort().values)
    assert (call.weight[kept] - expected).abs().gt(1e-3).double().mean() > 0.5


def test_shuffled_weights_per_class_stay_among_the_targets_kept():
    loss = WeightedLoss(dict(type='BernoulliKD'), dict(type='ShuffledWeighting', of=dict(type='DisagreementWeighting')))
    preds_S, preds_T, target = inputs((6, 5), 'some ignored')
    loss(preds_S, preds_T, target)
    kept = target != -100
    expected = (preds_T.sigmoid() - preds_S.sigmoid()).abs()[kept]
    assert_near(loss.last_call.weight[kept].flatten().sort().values, expected.detach().flatten().sort().values)


def test_shuffling_leaves_other_generators_alone_and_repeats_after_the_same_seed():
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    loss = shuffled()
    first = loss.last_call.weight
    assert torch.equal(torch.rand(3), drawn)
    loss(*example((64, 5), 'some ignored'))
    assert not torch.equal(loss.last_call.weight, first)  # each batch draws
    for again in (loss, WeightedLoss(dict(type='TTM'), dict(type='ShuffledWeighting'))):
        torch.manual_seed(6)
        again(*example((64, 5), 'some ignored'))
        torch.manual_seed(5)
        again(*example((64, 5), 'some ignored'))
        assert torch.equal(again.last_call.weight, first)


def test_shuffling_of_ranks_with_other_seeds_differs():
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(shuffled().last_call.weight)
    assert not torch.equal(*weights)


def test_permutations_are_drawn_evenly():
    # of three weights each of the 6 orders: 6,000 draws, so that one standard deviation is 29
    weights, kept = torch.tensor([1.0, 2.0, 9.0, 3.0]), torch.tensor([True, True, False, True])
    generator, found = torch.Generator().manual_seed(0), {}
    for _ in range(6000):
        order = tuple(permuted(weights, kept, generator).tolist())
        found[order] = found.get(order, 0) + 1
    assert len(found) == 6 and all(order[2] == 9 for order in found)
    assert all(abs(times - 1000) < 150 for times in found.values())


# ---- teacher losses of a file


def test_a_file_is_found_by_sample_idx_and_recorded():
    loss = applied('SoftCrossEntropy', 'WSL, file', (5, 7), 'some ignored')
    expected = [TEACHER_LOSSES[sample.metainfo['sample_idx']] for sample in samples(5)]
    assert loss.sample_terms['L_t'].tolist() == expected
    student = [d.hard_loss(d.z_s) for d in decisions((5, 7), 'indices', False)]
    kept = loss.sample_terms['kept']
    assert_near(
        loss.sample_terms['w'][kept],
        torch.tensor([of_losses(s, t) for s, t in zip(student, expected)])[kept],
        rtol=1e-6,
        atol=1e-9,
    )
    assert not loss.state_dict()  # the file is no part of a checkpoint


def test_a_products_factors_do_not_see_each_others_teacher():
    plain, soft = WEIGHTINGS['WSL'].config, WEIGHTINGS['WSL, temperature'].config
    expected = [
        a * b
        for a, b in zip(
            *(weight_values(name, (5, 7), 'indices', False, 1.0) for name in ('WSL', 'WSL, temperature')), strict=True
        )
    ]
    for factors in ([plain, soft], [soft, plain]):
        loss = WeightedLoss(dict(type='TTM'), dict(type='ProductWeighting', factors=factors))
        loss(*example())
        assert_near(loss.last_call.weight, expected)


def test_a_file_needs_data_samples_and_their_indices():
    loss = WeightedLoss(dict(type='TTM'), WEIGHTINGS['WSL, file'].config)
    with pytest.raises(ValueError, match='no data_samples: use mmwsl.WSLDistiller'):
        loss(*example())
    nameless = samples(5)
    nameless[3].metainfo = {}
    with pytest.raises(ValueError, match="no sample_idx: keep 'sample_idx' in meta_keys"):
        loss(*example(), data_samples=nameless)
    with pytest.raises(ValueError, match=r'targets have shape \(2, 3\): use it for classification'):
        loss(*example((2, 5, 3)), data_samples=samples(2))
    with pytest.raises(ValueError, match='WSLWeighting needs class indices, got class scores'):
        loss(*example(kind='scores'), data_samples=samples(5))


# ---- what is refused


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (
            dict(type='WSLWeighting', teacher_losses='a.npz', teacher_tau=2.0),
            "teacher_tau=2.0 applies to the teacher's logits",
        ),
        (dict(type='WSLWeighting', teacher_tau=0.0), 'tau should be a positive number, got 0.0'),
        (dict(type='WSLWeighting', momentum=1.0), r'momentum should be in \[0, 1\), got 1.0'),
        (dict(type='WTTMWeighting', tau=-1.0), 'tau should be a positive number, got -1.0'),
        (dict(type='EntropyWeighting', tau=math.inf), 'tau should be a positive number, got inf'),
        (dict(type='DisagreementWeighting', beta=-0.5), 'beta should be at least 0, got -0.5'),
        (dict(type='ProductWeighting', factors=[]), 'factors is empty: a product needs at least one weighting'),
        (dict(type='RegularizationWeighting', keep='all'), "keep should be 'others' or 'regularization', got 'all'"),
    ],
)
def test_settings_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        WeightedLoss(dict(type='BernoulliKD'), config)


def test_one_class_has_no_entropy_of_the_student():
    with pytest.raises(
        ValueError, match=r"at least 2 classes, got 1. For a single logit.* loss=dict\(type='BernoulliKD'\)"
    ):
        WeightedLoss(dict(type='SoftCrossEntropy'), dict(type='EntropyWeighting', student=True))(
            torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
        )


def test_repr_names_the_settings():
    shown = repr(
        WeightedLoss(
            dict(type='TTM'),
            dict(
                type='ProductWeighting',
                factors=[
                    dict(type='EntropyWeighting', student=True),
                    dict(type='WSLWeighting', teacher_tau=2.0),
                    dict(type='WTTMWeighting', tau=3.0),
                    dict(type='RegularizationWeighting'),
                ],
            ),
        )
    )
    for setting in (
        'EntropyWeighting(student=True, tau=1.0)',
        'teacher_tau=2.0',
        'WTTMWeighting(tau=3.0)',
        "RegularizationWeighting(keep='others')",
    ):
        assert setting in shown
