import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader

from mmwsl.analysis import read_records, records_of_logits
from mmwsl.engine.hooks import SampleRecordHook
from mmwsl.engine.hooks.sample_record_hook import _histogram, _sampled
from mmwsl.models.losses import WSLLoss
from tests.tiny import build, digits_config, distillation, launch, network, run_digits

HOOK = dict(type='mmwsl.SampleRecordHook')


def with_loss(**loss):
    return distillation(
        distiller=dict(
            type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl={**dict(type='mmwsl.WSLLoss', tau=4.0), **loss})
        )
    )


class Spy(Hook):
    """Keeps, of each batch, records made from the logits that the loss was given."""

    def __init__(self, monkeypatch):
        self.inputs, self.epochs = None, []
        forward = WSLLoss.forward

        def listening(loss, preds_S, preds_T, gt_labels, *args, **kwargs):
            self.inputs = preds_S.detach().clone(), preds_T.clone(), gt_labels.clone()
            return forward(loss, preds_S, preds_T, gt_labels, *args, **kwargs)

        monkeypatch.setattr(WSLLoss, 'forward', listening)

    def before_train_epoch(self, runner):
        self.epochs.append([])

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        index = [sample.sample_idx for sample in data_batch['data_samples']]
        self.epochs[-1].append(records_of_logits(index, *self.inputs, tau=4.0))


@pytest.mark.parametrize('weighting', ['wsl', 'one'])
def test_records_and_logged_scalars_are_those_of_what_the_loss_saw(tmp_path, monkeypatch, weighting):
    spy = Spy(monkeypatch)
    cfg = digits_config(tmp_path, with_loss(weighting=weighting), 2, custom_hooks=[HOOK])
    cfg.default_hooks.logger.interval = 2
    runner = Runner.from_cfg(cfg)
    runner.register_hook(spy)
    runner.train()
    records = read_records(tmp_path)
    assert list(records) == [1, 2]
    logged = [line for line in scalars(tmp_path) if 'wsl/w_p50' in line]
    assert [line['step'] for line in logged] == [2, 4, 6, 8, 10, 12]
    for (epoch, found), batches, lines in zip(records.items(), spy.epochs, (logged[:3], logged[3:])):
        expected = np.sort(np.concatenate(batches), order='index')
        assert found['index'].tolist() == list(range(600))
        for name in found.dtype.names[1:]:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5, err_msg=f'{name}, {epoch}')
        for line, pair in zip(lines, (batches[:2], batches[2:4], batches[4:])):
            since = np.concatenate(pair)
            for level in (10, 50, 90):
                assert line[f'wsl/w_p{level}'] == pytest.approx(np.percentile(since['w'], level), abs=1e-4)
            assert line['wsl/L_s'] == pytest.approx(since['L_s'].mean(), rel=1e-4)
            assert line['wsl/L_t'] == pytest.approx(since['L_t'].mean(), rel=1e-4)


def scalars(work_dir):
    log = next(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_an_epoch_shorter_than_the_loggers_interval_is_logged(tmp_path):
    runner = run_digits(tmp_path, with_loss(), custom_hooks=[HOOK], default_hooks=dict(logger=dict(interval=100)))
    assert len(runner.message_hub.get_scalar('train/wsl/w_p50').data[0]) == 1


def test_every_interval_and_after_the_last_epoch(tmp_path):
    run_digits(tmp_path, with_loss(), 5, custom_hooks=[dict(HOOK, interval=2)])
    assert list(read_records(tmp_path)) == [2, 4, 5]
    pictures = sorted(path.name for path in tmp_path.glob('*/vis_data/vis_image/*'))
    assert pictures == ['wsl_weights_2.png', 'wsl_weights_4.png', 'wsl_weights_5.png']


def test_histogram_shows_where_the_weights_are():
    low, high = (_histogram(np.full(100, w, np.float32), 3) for w in (0.1, 0.9))
    assert low.dtype == np.uint8 and low.shape == high.shape and low.shape[2] == 3

    def dark(picture):
        return np.argwhere((picture == 102).all(2))[:, 1].mean() / picture.shape[1]

    assert dark(low) < 0.4 and dark(high) > 0.7


def test_recording_changes_nothing_that_is_trained(tmp_path):
    weights = [
        run_digits(tmp_path / name, with_loss(), custom_hooks=hooks).model.student.state_dict()
        for name, hooks in (('with', [HOOK]), ('without', []))
    ]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.fixture
def recorded(tmp_path):
    """A hook that has begun an epoch of three batches, and a function that gives it one."""
    loss = WSLLoss()
    model = SimpleNamespace(distiller=SimpleNamespace(distill_losses=dict(loss_wsl=loss)), distillation_stopped=False)
    loader = DataLoader(range(6), batch_size=2)
    runner = SimpleNamespace(
        model=model,
        train_loop=None,
        hooks=[],
        epoch=0,
        max_epochs=9,
        train_dataloader=loader,
        work_dir=tmp_path,
        visualizer=SimpleNamespace(add_image=lambda *args, **kwargs: None),
    )
    hook = SampleRecordHook()
    hook.before_train(runner)
    hook.before_train_epoch(runner)

    def step(batch_idx, shape=(2, 5), target=None, **meta):
        size, classes, *rest = shape
        target = torch.randint(classes, (size, *rest)) if target is None else torch.tensor(target)
        loss(torch.randn(shape, requires_grad=True), torch.randn(shape), target)
        samples = [DataSample(metainfo=meta or dict(sample_idx=size * batch_idx + i)) for i in range(size)]
        hook.after_train_iter(runner, batch_idx, dict(data_samples=samples))

    return hook, runner, step


def test_an_epoch_that_was_seen_in_part_is_not_written(recorded, tmp_path):
    hook, runner, step = recorded
    step(0), step(1)
    hook.after_train_epoch(runner)
    assert not (tmp_path / 'sample_records').exists()
    runner.epoch = 1
    hook.before_train_epoch(runner)
    for batch_idx in range(3):
        step(batch_idx)
    hook.after_train_epoch(runner)
    ((epoch, records),) = read_records(tmp_path).items()
    assert epoch == 2 and records['index'].tolist() == [0, 1, 2, 3, 4, 5]


def test_ignored_targets_are_left_out(recorded, tmp_path):
    hook, runner, step = recorded
    logged = {}
    runner.message_hub = SimpleNamespace(update_scalar=lambda name, value: logged.update({name: float(value)}))
    for batch_idx, target in enumerate([[-100, 1], [2, -100], [-100, -100]]):
        step(batch_idx, target=target)
    hook._log(runner)
    hook.after_train_epoch(runner)
    ((_, records),) = read_records(tmp_path).items()
    assert records['index'].tolist() == [1, 2]
    assert logged['train/wsl/L_s'] == pytest.approx(records['L_s'].mean())
    hook.unlogged = 1
    logged.clear()
    hook._log(runner)
    assert not logged


def test_after_distillation_has_stopped_there_is_nothing_to_record(recorded, tmp_path):
    hook, runner, step = recorded
    step(0), step(1)
    runner.model.distillation_stopped = True
    step(2)
    hook.after_train_epoch(runner)
    assert not (tmp_path / 'sample_records').exists()


def test_what_is_kept_does_not_keep_the_graph(recorded):
    hook, _, step = recorded
    step(0)
    assert not any(terms.requires_grad for terms in hook.terms)


def test_samples_without_an_index(recorded):
    with pytest.raises(ValueError, match="keep 'sample_idx' in meta_keys"):
        recorded[2](0, img_path='a.png')


@pytest.mark.parametrize('shape', [(2, 5, 3), (2, 5, 80, 90)], ids=['all', 'some'])
def test_of_dense_targets_percentiles_alone_are_logged(recorded, tmp_path, shape):
    hook, runner, step = recorded
    hook.log_interval, logged, said, weights = 2, {}, [], []
    runner.message_hub = SimpleNamespace(update_scalar=lambda name, value: logged.update({name: float(value)}))
    runner.logger = SimpleNamespace(info=said.append)
    for batch_idx in range(2):
        step(batch_idx, shape=shape)
        weights.append(hook.loss.sample_terms['w'].flatten())
    assert said == [
        'SampleRecordHook writes no records, because samples have several targets. It logs only percentiles.'
    ]
    # of 14,400 targets 4,096: the error of a quantile of 8,192 is 0.006 at most, and these have less density than 0.5
    near = 1e-6 if shape == (2, 5, 3) else 0.04
    for level in (10, 50, 90):
        assert logged[f'train/wsl/w_p{level}'] == pytest.approx(np.percentile(torch.cat(weights), level), abs=near)
    assert hook.terms == [] and not hook.indices
    step(2, shape=shape)
    hook.after_train_epoch(runner)
    assert not (tmp_path / 'sample_records').exists()


def test_no_target_is_sampled_twice_and_others_in_the_next_step():
    rows = torch.arange(3 * 4096.0).expand(4, -1)
    seen = torch.cat([_sampled(rows, step) for step in (7, 8, 9)], 1)
    assert seen.shape == (4, 3 * 4096) and seen[0].sort().values.tolist() == rows[0].tolist()
    assert _sampled(rows[:, :4096], 3) is not None and _sampled(rows[:, :4096], 3).shape == (4, 4096)
    first = _sampled(rows, 0)[0]
    assert [(first // 1024 == part).sum().item() for part in range(12)] == pytest.approx([341.3] * 12, abs=3)


@pytest.mark.parametrize(
    'model, message',
    [
        (network(2), "there is none.*WSLLoss with weighting='one'"),
        (with_loss(type='mmrazor.KLDivergence'), 'there is none'),
        (
            distillation(
                distiller=dict(
                    type='mmwsl.WSLDistiller',
                    distill_losses=dict(loss_1=dict(type='mmwsl.WSLLoss'), loss_2=dict(type='mmwsl.WSLLoss')),
                )
            ),
            'there are loss_1, loss_2',
        ),
    ],
    ids=['network alone', 'KLDivergence', 'two losses'],
)
def test_model_without_exactly_one_loss_stops_before_the_first_step(tmp_path, model, message):
    with pytest.raises(ValueError, match=message):
        run_digits(tmp_path, model, custom_hooks=[HOOK])


def test_a_run_by_iterations_logs_percentiles_and_writes_nothing(tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    cfg = digits_config(
        tmp_path,
        with_loss(),
        custom_hooks=[HOOK],
        param_scheduler=None,
        train_dataloader=dict(sampler=dict(type='mmwsl.InfiniteViewSampler', shuffle=True)),
    )
    cfg.train_cfg = dict(by_epoch=False, max_iters=9)  # an epoch of the data has 6
    cfg.log_processor = dict(by_epoch=False)
    cfg.default_hooks.logger.interval = 4
    runner = Runner.from_cfg(cfg)
    runner.register_hook(spy)
    runner.train()
    logged = [line for line in scalars(tmp_path) if 'wsl/w_p50' in line]
    assert [line['step'] for line in logged] == [4, 8]
    for line, batches in zip(logged, (spy.epochs[0][:4], spy.epochs[0][6:8])):  # 6 ends an epoch, and is no logger's
        assert line['wsl/w_p90'] == pytest.approx(np.percentile(np.concatenate(batches)['w'], 90), abs=1e-4)
    assert not (tmp_path / 'sample_records').exists()
    assert 'writes no records, because the run counts iterations' in next(tmp_path.glob('*/*.log')).read_text()


@pytest.mark.slow
def test_two_processes_write_one_record_of_all_samples(tmp_path):
    torch.manual_seed(0)
    torch.save(build(network(16, depth=14)).state_dict(), tmp_path / 'teacher.pth')
    launch(
        'dist_train.sh',
        'configs/wsl_digits.py',
        2,
        '--work-dir',
        tmp_path,
        '--no-validate',
        '--cfg-options',
        f'model.teacher_ckpt={tmp_path / "teacher.pth"}',
        'train_cfg.max_epochs=1',
        'train_dataloader.batch_size=25',
        'default_hooks.sample_records.type=mmwsl.SampleRecordHook',
    )
    ((epoch, records),) = read_records(tmp_path).items()
    assert epoch == 1 and records['index'].tolist() == list(range(600))


@pytest.mark.parametrize('views', [True, False])
def test_joined_datasets_have_a_record_of_each_image(tmp_path, views):
    parts = [dict(type='mmwsl.Digits', split=split, pipeline=[dict(type='PackInputs')]) for split in ('train', 'test')]
    joined = dict(type='ConcatDataset', datasets=parts, _delete_=True)
    loader = dict(batch_size=600, dataset=dict(dataset=joined) if views else joined)
    if not views:
        loader['sampler'] = dict(type='DefaultSampler', shuffle=True, _delete_=True)
    run_digits(tmp_path, with_loss(), custom_hooks=[HOOK], train_dataloader=loader)
    assert read_records(tmp_path)[1]['index'].tolist() == list(range(1797))
