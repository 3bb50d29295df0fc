import logging
import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import DATASETS

from mmwsl.datasets import Digits
from mmwsl.engine.hooks import CheckTeacherHook, check_teacher_hook
from mmwsl.engine.ratings import Figure, _constant_miou, chosen_figure
from tests.tiny import PREPROCESSOR, distillation, network, run_digits


@DATASETS.register_module()
class SortedDigits(Digits):
    """Class after class, as folders hold them."""

    def load_data_list(self):
        return sorted(super().load_data_list(), key=lambda item: item['gt_label'])


@DATASETS.register_module()
class OtherDigits(Digits):
    METAINFO = {'classes': ('0', '1', '2', '3', '4', '5', '6', '7', '9', 'eight')}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A teacher that knows the digits better than chance, and its accuracy."""
    folder = tmp_path_factory.mktemp('teacher')
    runner = run_digits(folder, network(4), epochs=5, custom_hooks=[])
    return str(folder / 'epoch_5.pth'), runner.message_hub.get_scalar('val/accuracy/top1').current()


def run(work_dir, model, hook=None, **kwargs):
    hooks = [dict(type='mmwsl.CheckTeacherHook', **(hook or {}))]
    return run_digits(work_dir, model, custom_hooks=hooks, **kwargs)


@pytest.mark.parametrize('norm_eval', [True, False])
def test_the_teachers_accuracy_in_eval_mode_is_logged(tmp_path, trained, norm_eval):
    path, accuracy = trained
    model = distillation(teacher_ckpt=path, teacher_norm_eval=norm_eval)
    runner = run(tmp_path, model, dict(max_batches=100))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'Teacher: {accuracy:.2f} % top-1 on 1197 validation images.' in log
    assert runner.iter == 6


@pytest.mark.parametrize('averages', [False, True])
def test_the_memory_of_a_teacher_that_is_copied_with_the_model_is_logged(tmp_path, trained, averages):
    hooks = [dict(type='mmwsl.CheckTeacherHook', max_batches=1), *[dict(type='EMAHook')] * averages]
    runner = run_digits(tmp_path, distillation(teacher_ckpt=trained[0]), custom_hooks=hooks)
    size = (
        sum(
            4 if value.dtype == torch.float32 else 8
            for value in runner.model.teacher.state_dict().values()
            for _ in range(value.numel())
        )
        / 1e6
    )
    said = f'EMAHook also copies the teacher: {size:.3g} MB more.'
    assert (said in next(tmp_path.glob('*/*.log')).read_text()) == averages


def test_at_most_max_batches_are_looked_at(tmp_path, trained):
    run(tmp_path, distillation(teacher_ckpt=trained[0]), dict(max_batches=1))
    assert 'top-1 on 400 validation images' in next(tmp_path.glob('*/*.log')).read_text()


def test_teacher_that_knows_nothing_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r'chance is 10\.00 % and 20\.00 % is required.*min_score'):
        run(tmp_path, distillation())


def judge(accuracy, classes=10, images=1000, **hook):
    score = check_teacher_hook._Score(accuracy, images, classes)
    CheckTeacherHook(**hook)._judge(SimpleNamespace(logger=logging.getLogger()), score, 'images')


@pytest.mark.parametrize('classes, required', [(2, 0.75), (3, 2 / 3), (100, 0.02)])
def test_twice_chance_is_required_and_of_two_classes_half_way_to_perfect(classes, required):
    judge(required + 1e-6, classes)
    with pytest.raises(RuntimeError, match=rf'and {100 * required:.2f} % is required'):
        judge(required - 1e-6, classes)


@pytest.mark.parametrize('hook', [dict(min_score=60), dict(min_accuracy=0.6)])
def test_the_least_score_may_be_stated(hook):
    judge(0.6, **hook)
    with pytest.raises(RuntimeError, match=r'60\.00 % is required'):
        judge(0.59, **hook)
    with pytest.raises(ValueError, match='both set the lowest score: leave min_accuracy out'):
        CheckTeacherHook(min_accuracy=0.5, min_score=50)


@pytest.mark.parametrize(
    'images, tolerance',
    [
        (10_000, 3.0),  # three standard errors of 80 % of 10,000 are 1.2 points
        (400, 6.0),
    ],
)  # and of 400 6 points: 3 sqrt(0.8 * 0.2 / 400)
def test_a_score_below_the_expected_one_stops_the_run(images, tolerance):
    judge(0.8, images=images, expected_score=80 + tolerance - 0.01)
    judge(0.8, images=images, expected_score=20)
    with pytest.raises(RuntimeError, match=rf'expected_score of the hook .* \(give or take {tolerance:.2f}\)'):
        judge(0.8, images=images, expected_score=80 + tolerance + 0.01)


def test_images_that_lie_in_order_of_classes_are_looked_at_in_another(tmp_path, trained):
    """A teacher that only ever says 0 has a tenth of all images right, and most of the first 100."""
    checkpoint = torch.load(trained[0], weights_only=False)
    checkpoint['state_dict']['head.fc.bias'][0] = 1e4
    torch.save(checkpoint, tmp_path / 'says_0.pth')
    with pytest.raises(RuntimeError, match=r'gets (\d|1\d)\.\d\d % of 200 validation images right'):
        run(
            tmp_path,
            distillation(teacher_ckpt=str(tmp_path / 'says_0.pth')),
            dict(max_batches=1),
            val_dataloader=dict(batch_size=200, dataset=dict(type='SortedDigits')),
        )


def test_training_and_validation_have_the_same_classes(tmp_path, trained):
    with pytest.raises(ValueError, match=r"only in training: \['8'\], only in validation: \['eight'\]"):
        run(tmp_path, distillation(teacher_ckpt=trained[0]), val_dataloader=dict(dataset=dict(type='OtherDigits')))


@DATASETS.register_module()
class SwappedDigits(Digits):
    METAINFO = {'classes': ('0', '1', '3', '2', '4', '5', '6', '7', '8', '9')}


def test_another_order_of_the_classes_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"same classes in another order.*class 2 is '2' in training and '3' in valid"):
        run(tmp_path, network(2), val_dataloader=dict(dataset=dict(type='SwappedDigits')))


def test_fewer_outputs_than_classes_stop_any_run(tmp_path):
    with pytest.raises(ValueError, match='the data have 10 classes and the student predicts 9: set num_classes'):
        run(tmp_path, network(2, classes=9))


def test_more_outputs_than_classes_are_said(tmp_path):
    assert run(tmp_path, network(2, classes=11)).iter == 6
    assert 'the data have 10 classes and the student predicts 11' in next(tmp_path.glob('*/*.log')).read_text()


def test_the_check_can_be_overridden(tmp_path):
    assert run(tmp_path, distillation(), dict(min_accuracy=0)).iter == 6


def test_class_counts_that_differ_stop_the_run(tmp_path):
    with pytest.raises(ValueError, match='the teacher predicts 12 classes and the student 10: set num_classes'):
        run(tmp_path, distillation(teacher=network(4, classes=12)))


def test_without_validation_data_there_is_a_warning(tmp_path):
    runner = run(
        tmp_path,
        distillation(),
        val_cfg=None,
        val_dataloader=None,
        val_evaluator=None,
        checkpoint=dict(type='CheckpointHook', _delete_=True),
    )
    assert runner.iter == 6
    assert 'The teacher was not checked: there is no validation data' in next(tmp_path.glob('*/*.log')).read_text()


@pytest.fixture
def several_labels(monkeypatch):
    """Images look as if they had several labels, so a teacher is scored by the metric of the validation."""
    monkeypatch.setattr(check_teacher_hook, 'single_labels', lambda data_samples: None)


def log_of(work_dir):
    return next(work_dir.glob('*/*.log')).read_text()


@pytest.mark.usefixtures('several_labels')
def test_another_task_is_scored_by_its_metric(tmp_path, trained):
    path, accuracy = trained
    runner = run(tmp_path, distillation(teacher_ckpt=path), dict(max_batches=100, expected_score=accuracy))
    assert f'Teacher: accuracy/top1 {accuracy:.4g} on 1197 validation images.' in log_of(tmp_path)
    assert runner.iter == 6
    with pytest.raises(RuntimeError, match=r'has a accuracy/top1 of .* on 400 validation images; 99\.9 is required'):
        run(tmp_path / 'low', distillation(teacher_ckpt=path), dict(max_batches=1, min_score=99.9))


@pytest.mark.usefixtures('several_labels')
def test_a_metric_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr('mmpretrain.models.LinearClsHead.predict', lambda *args: 1 / 0)
    runner = run(tmp_path, distillation(), val_cfg=dict(), train_cfg=dict(val_begin=2))
    assert runner.iter == 6
    assert 'not checked: its predictions or the metric failed (ZeroDivisionError: division by zero)' in log_of(tmp_path)


@pytest.mark.usefixtures('several_labels')
def test_a_score_by_the_metric_changes_nothing(tmp_path, trained):
    """Not the generators, which mixup draws from, and not the evaluator."""
    mixing = dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8)])
    model = distillation(teacher_ckpt=trained[0], data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing))
    checked = run(tmp_path / 'checked', model)
    plain = run_digits(tmp_path / 'plain', model, custom_hooks=[])
    torch.testing.assert_close(checked.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    scores = [runner.message_hub.get_scalar('val/accuracy/top1').data[0].tolist() for runner in (checked, plain)]
    assert scores[0] == scores[1] and len(scores[0]) == 1


def figure(value, constant=None, name='mIoU', images=1000, **hook):
    CheckTeacherHook(**hook)._judge_figure(
        SimpleNamespace(logger=logging.getLogger()), Figure(name, value, images, constant)
    )


@pytest.mark.parametrize('constant, required', [(6.0, 12.0), (60.0, 80.0)])
def test_twice_the_best_class_everywhere_is_required(constant, required):
    figure(required + 0.01, constant)
    figure(0, constant, min_score=0)
    with pytest.raises(
        RuntimeError,
        match=rf'has a mIoU of .* the best class everywhere has {constant:.4g} and '
        rf'{required:.4g} is required\. Is teacher_ckpt the right',
    ):
        figure(required - 0.01, constant)


def test_no_other_figure_is_required_unless_it_is_stated():
    figure(0.01, name='pascal_voc/mAP')
    with pytest.raises(RuntimeError, match=r'pascal_voc/mAP of 0\.01 on 1000 validation images; 0\.3 is required'):
        figure(0.01, name='pascal_voc/mAP', min_score=0.3)


@pytest.mark.parametrize(
    'expected, images, tolerance', [(40.0, 10_000, 3.0), (40.0, 25, 29.4), (0.4, 10_000, 0.03), (0.4, 25, 0.294)]
)  # 3 sqrt(0.4 * 0.6 / 25) = 0.294
def test_a_figure_below_the_expected_one_stops_the_run(expected, images, tolerance):
    unit = 100 if expected > 1 else 1
    for share in (0.4, 0.6):  # errors of the score that is found: both have the same
        value = share * unit
        figure(value, images=images, expected_score=min(value + 0.99 * tolerance, unit))
    with pytest.raises(RuntimeError, match=r'but expected_score of the hook .* \(give or take [0-9.]+\)'):
        figure(0.4 * unit, images=images, expected_score=0.4 * unit + 1.01 * tolerance)


def test_the_best_class_everywhere_by_hand():
    pixels = torch.zeros(256, dtype=torch.int64)
    pixels[[0, 3, 255]] = torch.tensor([6, 2, 4])  # 6 of 8 for class 0, none for class 3
    assert _constant_miou(pixels) == 37.5


@pytest.mark.parametrize('save_best, wanted', [(None, 'mIoU'), ('auto', 'mIoU'), ('aAcc', 'aAcc')])
def test_the_figure_that_counts(save_best, wanted):
    runner = SimpleNamespace(hooks=[CheckpointHook(save_best=save_best, rule='greater')])
    assert chosen_figure(dict(aAcc=90.0, mIoU=50.0, table=[1, 2]), runner) == wanted
    assert chosen_figure(dict(table=[1, 2], loss=math.nan), runner) is None


def test_a_network_alone_is_not_checked(tmp_path):
    assert run(tmp_path, network(2)).iter == 6


def test_the_check_changes_nothing_that_training_draws(tmp_path, trained):
    def weights(name, hooks):
        cfg = distillation(teacher_ckpt=trained[0])
        return run_digits(tmp_path / name, cfg, custom_hooks=hooks).model.student.state_dict()

    checked = weights('checked', [dict(type='mmwsl.CheckTeacherHook')])
    torch.testing.assert_close(checked, weights('unchecked', []), rtol=0, atol=0)


def test_labels_are_mixed_over_the_classes_that_are_predicted(tmp_path):
    mixing = dict(
        type='mmpretrain.ClsDataPreprocessor',
        num_classes=12,
        batch_augments=dict(augments=[dict(type='Mixup', alpha=0.2)]),
    )
    with pytest.raises(ValueError, match='mixes labels of 12 classes and the student predicts 10: set num_classes=10'):
        run(tmp_path, network(2, data_preprocessor=mixing))


def test_a_metric_ranks_no_more_than_there_are_classes(tmp_path):
    ranks = [dict(type='mmpretrain.ConfusionMatrix'), dict(type='mmpretrain.Accuracy', topk=(1, 11))]
    with pytest.raises(ValueError, match=r'val_evaluator has topk=\(1, 11\) and the student predicts 10 classes: set'):
        run(tmp_path, network(2), val_evaluator=dict(_delete_=True, type='Evaluator', metrics=ranks))


def changed(path, folder, change):
    """A teacher's file with something changed."""
    checkpoint = torch.load(path, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, folder / 'changed.pth')
    return distillation(teacher_ckpt=str(folder / 'changed.pth'))


def test_logits_that_are_not_finite_stop_the_run(tmp_path, trained):
    def overflow(checkpoint):
        checkpoint['state_dict']['head.fc.weight'][3] *= 3e38

    with pytest.raises(RuntimeError, match=r"teacher's logits are not finite for \d+ of 400 validation images"):
        run(tmp_path, changed(trained[0], tmp_path, overflow))


def test_classes_in_another_order_than_in_the_teachers_file_stop_the_run(tmp_path, trained):
    def swap(checkpoint):
        names = list(checkpoint['meta']['dataset_meta']['classes'])
        names[2], names[7] = names[7], names[2]
        checkpoint['meta']['dataset_meta']['classes'] = tuple(names)

    with pytest.raises(ValueError, match="another order: class 2 is '7' in .*changed.pth and '2' in the validation"):
        run(tmp_path, changed(trained[0], tmp_path, swap))


def test_other_names_of_classes_are_said(tmp_path, trained):
    def rename(checkpoint):
        checkpoint['meta']['dataset_meta']['classes'] = tuple(f'digit {name}' for name in '0123456789')

    run(tmp_path, changed(trained[0], tmp_path, rename))
    assert "have other names than those of the data: class 0 is 'digit 0'" in next(tmp_path.glob('*/*.log')).read_text()


def test_normalisation_that_fits_better_is_named(tmp_path, trained):
    raw = dict(type='mmpretrain.ClsDataPreprocessor', mean=[0.0], std=[1.0], num_classes=10)
    run_digits(tmp_path / 'teacher', network(4), epochs=5, custom_hooks=[], data_preprocessor=raw)
    run(tmp_path, distillation(teacher_ckpt=str(tmp_path / 'teacher/epoch_5.pth')), dict(min_score=0))
    assert (
        '% with pixels from 0 to 255. Give model.teacher its own data_preprocessor'
        in next(tmp_path.glob('2*/*.log')).read_text()
    )
    run(tmp_path / 'right', distillation(teacher_ckpt=trained[0]))
    assert 'Give model.teacher' not in next(tmp_path.glob('right/*/*.log')).read_text()


def test_connector_may_join_other_numbers_of_classes(tmp_path):
    connectors = dict(fewer=dict(type='TorchFunctionalConnector', function_name='softmax', func_args=dict(dim=1)))
    model = distillation(
        teacher=network(4, classes=12),
        distiller=dict(
            type='mmwsl.WSLDistiller',
            connectors=connectors,
            distill_losses=dict(loss_l2=dict(type='L2Loss')),
            student_recorders=dict(features=dict(type='ModuleOutputs', source='backbone')),
            teacher_recorders=dict(features=dict(type='ModuleOutputs', source='backbone')),
            loss_forward_mappings=dict(
                loss_l2=dict(
                    s_feature=dict(recorder='features', from_student=True, data_idx=0),
                    t_feature=dict(recorder='features', from_student=True, data_idx=0),
                )
            ),
        ),
    )
    assert run(tmp_path, model).iter == 6
    assert 'connectors join them, so the teacher was not scored' in next(tmp_path.glob('*/*.log')).read_text()


def test_warmup_epochs_need_epochs(tmp_path):
    model = distillation(
        distiller=dict(
            type='mmwsl.WSLDistiller',
            distill_losses=dict(loss_kd=dict(type='mmwsl.WeightedLoss', loss=dict(type='DKD'), warmup_epochs=20)),
        )
    )
    with pytest.raises(ValueError, match='loss_kd: warmup_epochs=20 counts epochs.*would keep 1/20 of its weight'):
        run(tmp_path, model, train_cfg=dict(by_epoch=False, max_iters=2, _delete_=True), param_scheduler=None)
