
import pytest
import torch

from tests.tiny import distillation, network, run_digits


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A teacher that knows the digits better than chance, and its accuracy."""
    folder = tmp_path_factory.mktemp('teacher')
    runner = run_digits(folder, network(4), epochs=5, custom_hooks=[])
    return str(folder / 'epoch_5.pth'), runner.message_hub.get_scalar('val/accuracy/top1').current()


def run(work_dir, model, hook=None, **kwargs):
    hooks = [dict(type='mmwsl.CheckTeacherHook', **(hook or {}))]
    return run_digits(work_dir, model, custom_hooks=hooks, **kwargs)


def test_the_teachers_accuracy_is_logged(tmp_path, trained):
    path, accuracy = trained
    runner = run(tmp_path, distillation(teacher_ckpt=path), dict(max_batches=100))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert f'Teacher: {accuracy:.2f} % top-1 on 1197 validation images.' in log
    assert runner.iter == 6


def test_at_most_max_batches_are_looked_at(tmp_path, trained):
    run(tmp_path, distillation(teacher_ckpt=trained[0]), dict(max_batches=1))
    assert 'top-1 on 400 validation images' in next(tmp_path.glob('*/*.log')).read_text()


def test_teacher_that_knows_nothing_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r'chance is 10\.00 % and 20\.00 % is required.*min_accuracy'):
        run(tmp_path, distillation())


def test_the_check_can_be_overridden(tmp_path):
    assert run(tmp_path, distillation(), dict(min_accuracy=0)).iter == 6


def test_class_counts_that_differ_stop_the_run(tmp_path):
    with pytest.raises(ValueError, match='the teacher predicts 12 classes and the student 10: set num_classes'):
        run(tmp_path, distillation(teacher=network(4, classes=12)))


def test_without_validation_data_there_is_a_warning(tmp_path):
    runner = run(tmp_path, distillation(), val_cfg=None, val_dataloader=None, val_evaluator=None,
                 checkpoint=dict(type='CheckpointHook', _delete_=True))
    assert runner.iter == 6
    assert 'The teacher was not checked: there is no validation data' in next(tmp_path.glob('*/*.log')).read_text()


def test_a_network_alone_is_not_checked(tmp_path):
    assert run(tmp_path, network(2)).iter == 6


def test_the_check_changes_nothing_that_training_draws(tmp_path, trained):
    def weights(name, hooks):
        cfg = distillation(teacher_ckpt=trained[0])
        return run_digits(tmp_path / name, cfg, custom_hooks=hooks).model.student.state_dict()
    checked = weights('checked', [dict(type='mmwsl.CheckTeacherHook')])
    torch.testing.assert_close(checked, weights('unchecked', []), rtol=0, atol=0)
