import numpy as np
import pytest
import torch

from mmwsl.analysis import (
    RECORD,
    changed,
    flow,
    is_regularization,
    lowered_logit_share,
    read_records,
    records_of_logits,
    regularization_share,
    write_records,
)
from mmwsl.analysis import records as records_module
from mmwsl.models.losses import WSLLoss


def members(flags, index=None):
    """Records of which those flagged are regularization samples."""
    records = np.zeros(len(flags), RECORD)
    records['index'] = range(len(flags)) if index is None else index
    records['a'], records['b'] = -0.5, [-0.6 if flag else 0.4 for flag in flags]
    return records


def test_share_counts_where_b_outweighs_a():
    assert is_regularization(members([1, 0, 1, 0])).tolist() == [True, False, True, False]
    assert regularization_share(members([1, 0, 0, 0])) == 0.25
    assert np.isnan(regularization_share(members([])))


def test_a_tie_is_no_regularization_sample():
    records = members([1])
    records['b'] = 0.5
    assert regularization_share(records) == 0


def test_lowered_logits_are_those_whose_soft_label_lowers_the_logit():
    records = members([1, 1, 1, 0])
    records['b'] = [0.6, 0.51, -0.6, 0.4]
    assert (regularization_share(records), lowered_logit_share(records)) == (0.75, 0.5)
    assert np.isnan(lowered_logit_share(members([])))


def test_flow_of_five_samples():
    moved = flow(members([1, 1, 1, 0, 0]), members([1, 1, 0, 1, 0]))
    assert (moved.stay, moved.enter, moved.leave, moved.outside) == (0.4, 0.2, 0.2, 0.2)
    assert moved.kept == pytest.approx(2 / 3)


def test_flow_is_by_index_over_what_both_epochs_have():
    moved = flow(members([1, 0, 0], index=[7, 3, 9]), members([0, 0, 1, 1], index=[3, 4, 7, 9]))
    assert moved == pytest.approx((1 / 3, 1 / 3, 0, 1 / 3))


def test_of_a_sample_that_comes_twice_the_first_counts():
    assert flow(members([1, 0], index=[5, 5]), members([1], index=[5])).stay == 1


def test_changed_are_those_that_are_in_the_set_in_some_epoch_but_not_in_all():
    epochs = [members([1, 1, 0, 0, 1]), members([1, 0, 0, 1, 1]), members([1, 1, 0, 0, 1])]
    assert changed(epochs) == 0.4
    assert changed(epochs[:1]) == 0
    assert changed([epochs[0], members([0, 1], index=[4, 9])]) == 1  # only sample 4 is in both


def test_nothing_is_kept_of_an_empty_set():
    assert np.isnan(flow(members([0, 0]), members([1, 0])).kept)


def test_mixed_classes_have_no_share_and_no_flow():
    mixed = members([1, 0])
    mixed['a'], mixed['b'] = np.nan, np.nan
    assert np.isnan(regularization_share(mixed)) and np.isnan(lowered_logit_share(mixed))
    for refuse in (flow, lambda *epochs: changed(list(epochs))):
        with pytest.raises(ValueError, match='mixed classes.*use a run without batch_augments'):
            refuse(members([1, 0]), mixed)


def test_flow_between_strangers():
    with pytest.raises(ValueError, match='two epochs with 1 and 1 records have no sample in common'):
        flow(members([1], index=[0]), members([1], index=[1]))


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_records_of_logits_are_those_of_the_loss(tau):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 30, 5, generator=generator)
    target = torch.randint(5, (30,), generator=generator)
    loss = WSLLoss(tau)
    loss(student, teacher, target)
    records = records_of_logits(list(range(100, 130)), student, teacher, target, tau)
    assert records['index'].tolist() == list(range(100, 130))
    for name in RECORD.names[1:]:
        np.testing.assert_allclose(records[name], loss.sample_terms[name].numpy(), rtol=1e-4, atol=1e-6)
    assert regularization_share(records) == pytest.approx(loss.statistics['regularization_share'].item())


def test_records_are_read_as_they_were_written_in_order(tmp_path):
    for epoch in (10, 2):
        path = write_records(members([1, 0, 1], index=[8, 4, 6]), tmp_path, epoch)
        assert path == tmp_path / f'sample_records/epoch_{epoch}.npy'
    found = read_records(tmp_path)
    assert list(found) == [2, 10]
    assert found[2]['index'].tolist() == [4, 6, 8]
    assert is_regularization(found[2]).tolist() == [False, True, True]


def test_a_file_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(stream, array):
        stream.write(b'half')
        raise OSError('no space left')

    write_records(members([1]), tmp_path, 1)
    monkeypatch.setattr(records_module.np, 'save', fail)
    for epoch in (1, 2):
        with pytest.raises(OSError, match='no space'):
            write_records(members([0]), tmp_path, epoch)
    assert [regularization_share(records) for records in read_records(tmp_path).values()] == [1]


def test_a_run_without_records(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'default_hooks\.sample_records\.type=mmwsl\.SampleRecordHook'):
        read_records(tmp_path)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / 'sample_records').mkdir()
    np.save(tmp_path / 'sample_records/epoch_1.npy', np.zeros(3))
    with pytest.raises(ValueError, match=r'epoch_1\.npy should hold records of .*got float64'):
        read_records(tmp_path)
