import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.structures import DataSample

from mmwsl.analysis import RECORD, records_of_logits
from mmwsl.analysis.predict import (
    build_dataloader,
    build_model,
    choose_network,
    log_probabilities,
    network_config,
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


LENET = 'mmpretrain::lenet/lenet5_mnist.py'  # mean 33.46


@pytest.mark.parametrize(
    'algorithm, config, own, expected',
    [
        (1.0, 2.0, None, 1.0),
        (None, 2.0, None, 2.0),
        (None, None, 3.0, 3.0),
        (1.0, 2.0, 3.0, 1.0),
        (None, 2.0, 3.0, 2.0),
        (None, None, 'package', 33.46),
        (1.0, None, 'package', 1.0),
        (None, 2.0, 'package', 2.0),
    ],
)
@pytest.mark.parametrize('way', ['build_model', 'choose_network'])
def test_student_sees_images_as_in_training(cfg, algorithm, config, own, expected, way):
    def preprocessor(mean):
        return mean and dict(type='mmpretrain.ClsDataPreprocessor', mean=[mean], std=[2.0])

    cfg.data_preprocessor, cfg.model.data_preprocessor = preprocessor(config), preprocessor(algorithm)
    cfg.model.architecture = (
        dict(cfg_path=LENET) if own == 'package' else network(2, data_preprocessor=preprocessor(own))
    )
    if way == 'choose_network':
        assert choose_network(cfg, 'architecture', 'file.pth') == 'file.pth'
        assert 'architecture' not in cfg.model
    student = build_model(cfg, student_only=True)
    assert student.data_preprocessor.mean.item() == pytest.approx(expected)
    assert type(student.backbone).__name__ == ('LeNet5' if own == 'package' else 'CIFARResNet')


@pytest.mark.parametrize(
    'teacher, mean',
    [
        (network(4), 4.9),
        (network(4, data_preprocessor=dict(mean=[7.0], std=[1.0])), 7.0),
        (dict(cfg_path=LENET), 33.46),
    ],
)
def test_teacher_may_have_its_own_kind_of_input(cfg, teacher, mean):
    cfg.model.teacher = teacher
    assert network_config(cfg, 'teacher').data_preprocessor.mean[0] == mean
    assert cfg.model.teacher == teacher


@pytest.mark.parametrize(
    'named, expected',
    [
        (dict(init_cfg=dict(type='Pretrained', checkpoint='own.pth')), 'own.pth'),
        (dict(pretrained='own.pth'), 'own.pth'),
        (dict(type='TimmClassifier', model_name='resnet18', pretrained=True), None),
        (dict(cfg_path=LENET, pretrained=True), 'published.pth'),
    ],
)
def test_teacher_whose_config_names_its_weights(cfg, monkeypatch, named, expected):
    monkeypatch.setattr(
        'mmengine.hub.hub._get_cfg_metainfo',
        lambda package, path: dict(Config='configs/lenet/lenet5_mnist.py', Weights='published.pth'),
    )
    cfg.model.teacher_ckpt = None
    cfg.model.teacher = named
    assert choose_network(cfg, 'teacher') == expected


def test_teacher_without_a_file(cfg):
    cfg.model.teacher_ckpt = None
    with pytest.raises(ValueError, match='names no teacher_ckpt: give the checkpoint on the command line'):
        choose_network(cfg, 'teacher')


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
    with pytest.raises(ValueError, match="does not hold the teacher's exact logits.*without teacher_cache"):
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
    with pytest.raises(ValueError, match='the model of this config, a ImageClassifier, has none'):
        records_of_checkpoints(cfg, {}, [4.0])


@pytest.mark.parametrize('sample', [DataSample(), DataSample().set_gt_label([1, 2])])
def test_image_without_one_class(sample):
    with pytest.raises(ValueError, match='each image should have exactly one class'):
        true_classes([sample])
