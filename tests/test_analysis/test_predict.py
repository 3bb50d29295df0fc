import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.structures import DataSample

from mmwsl.analysis import RECORD, records_of_logits
from mmwsl.analysis.predict import (
    build_dataloader,
    build_model,
    log_probabilities,
    records_of_checkpoints,
    true_classes,
)
from tests.caches import cached, live, make_cache
from tests.tiny import PREPROCESSOR, ROOT, build, distillation, network, save_teacher


@pytest.fixture
def cfg(tmp_path):
    cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
    cfg.model = distillation(teacher_ckpt=save_teacher(tmp_path / 'teacher.pth'))
    return cfg


def test_student_is_built_without_its_teacher(cfg):
    cfg.model.teacher_ckpt = 'no/such/file.pth'
    student = build_model(cfg, student_only=True)
    assert type(student).__name__ == 'ImageClassifier' and not student.training
    assert student.data_preprocessor.mean.flatten().tolist() == pytest.approx([4.9])


def test_network_alone_takes_the_preprocessor_of_the_config(cfg):
    cfg.model = network(2)
    cfg.data_preprocessor.mean = [3.0]
    assert build_model(cfg, student_only=True).data_preprocessor.mean.flatten().tolist() == [3.0]


def test_without_workers_there_is_nothing_to_keep_alive(cfg):
    cfg.val_dataloader.update(num_workers=0, persistent_workers=True)
    assert build_dataloader(cfg, 'val_dataloader').num_workers == 0


def test_log_probabilities_are_those_of_each_test_image(cfg):
    student = build_model(cfg, student_only=True)
    loader = build_dataloader(cfg, 'val_dataloader')
    log_probs, target = log_probabilities(student, loader)
    assert log_probs.shape == (1197, 10) and log_probs.dtype == np.float32
    for index in (0, 700, 1196):
        item = loader.dataset[index]
        with torch.no_grad():
            logits = student((item['inputs'][None].float() - 4.9) / 6.0, mode='tensor')[0]
        np.testing.assert_allclose(log_probs[index], logits.log_softmax(0), rtol=1e-4, atol=1e-5)
        assert target[index] == item['data_samples'].gt_label.item()


def test_records_are_not_made_from_an_inexact_cache(tmp_path):
    run = live(save_teacher(tmp_path / 'teacher.pth'))
    folder = make_cache(tmp_path / 'cache', run, views=1, dtype='float16')
    with pytest.raises(ValueError, match="do not hold the teacher's exact logits.*without teacher_cache"):
        records_of_checkpoints(cached(run, folder), {}, [4.0])


@pytest.mark.parametrize('norm_eval', [True, False])
def test_records_of_checkpoints_are_those_of_their_students(cfg, tmp_path, norm_eval):
    cfg.model.teacher_norm_eval = norm_eval
    files = {}
    for epoch in (1, 3):
        files[epoch] = save_teacher(tmp_path / f'epoch_{epoch}.pth', network(2), seed=epoch)
    found = records_of_checkpoints(cfg, files, [1.0, 4.0])
    assert {tau: list(epochs) for tau, epochs in found.items()} == {1.0: [1, 3], 4.0: [1, 3]}
    model = build({**cfg.model, 'data_preprocessor': PREPROCESSOR})
    model.train()  # the teacher as it is while the student learns
    loader = build_dataloader(cfg, 'train_dataloader')
    for tau, epoch in ((1.0, 3), (4.0, 1)):
        student = build(dict(network(2), data_preprocessor=PREPROCESSOR))
        student.load_state_dict(torch.load(files[epoch])['state_dict'])
        student.eval()
        parts = []
        for batch in loader:
            batch = student.data_preprocessor(batch, False)
            with torch.no_grad():
                preds_T = model.teacher(batch['inputs'], mode='tensor')
                preds_S = student(batch['inputs'], mode='tensor')
            index = [sample.sample_idx for sample in batch['data_samples']]
            target = torch.cat([sample.gt_label for sample in batch['data_samples']])
            parts.append(records_of_logits(index, preds_S, preds_T, target, tau))
        expected = np.sort(np.concatenate(parts), order='index')
        records = found[tau][epoch]
        assert records.dtype == RECORD and records['index'].tolist() == list(range(600))
        for name in RECORD.names[1:]:
            np.testing.assert_allclose(records[name], expected[name], rtol=1e-4, atol=1e-5)


def test_network_alone_has_no_regularization_samples(cfg):
    cfg.model = network(2)
    with pytest.raises(ValueError, match='this config has none: its model is a ImageClassifier'):
        records_of_checkpoints(cfg, {}, [4.0])


@pytest.mark.parametrize('sample', [DataSample(), DataSample().set_gt_label([1, 2])])
def test_image_without_one_class(sample):
    with pytest.raises(ValueError, match='each image should have one class'):
        true_classes([sample])
