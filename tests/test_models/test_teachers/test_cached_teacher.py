import copy

import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS

from mmwsl.cache import CacheError
from mmwsl.datasets import SeededViews
from mmwsl.datasets.views import View
from mmwsl.models import CachedTeacher, CIFARResNet
from tests.caches import cached, live, make_cache
from tests.tiny import PREPROCESSOR, build, losses, network, save_teacher

KINDS = {
    'all': {},
    'float16': dict(dtype='float16'),
    'top 3': dict(top_k=3),
    'top 3, float16': dict(top_k=3, dtype='float16'),
}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_teacher(
        tmp_path_factory.mktemp('teacher') / 'teacher.pth',
        network(4, init_cfg=[dict(type='Normal', layer='Linear', std=2.0)]),
    )  # logits of some size


@pytest.fixture(scope='module')
def folders(tmp_path_factory, teacher):
    """A cache of each kind."""
    root = tmp_path_factory.mktemp('caches')
    return {kind: make_cache(root / kind, live(teacher), **options) for kind, options in KINDS.items()}


def models(teacher, folder, **model):
    """A live one and its cached twin, with the same student."""
    cfg = live(teacher, **model)
    twins = build(cfg.model), build(cached(cfg, folder).model)
    twins[1].student.load_state_dict(twins[0].student.state_dict())
    return twins


def views(folder, epoch=1, images=range(16)):
    """A batch as the cached run's dataloader makes it."""
    dataset = DATASETS.build(cached(live(None), folder).train_dataloader.dataset)
    return default_collate([dataset[View(image, epoch, 99)] for image in images])


def results(model, data):
    torch.manual_seed(0)
    return {name: value.detach() for name, value in losses(model, copy.deepcopy(data)).items()}


def test_dense_records_teach_as_the_network_does(teacher, folders):
    network_, records = models(teacher, folders['all'])
    data = views(folders['all'])
    wanted = results(records, data)
    for sample in data['data_samples']:
        del sample.teacher_answer
    torch.testing.assert_close(wanted, results(network_, data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', ['float16', 'top 3', 'top 3, float16'])
def test_other_records_weight_as_the_network_does(teacher, folders, kind):
    network_, records = models(teacher, folders[kind])
    data = views(folders[kind])
    found = results(records, data)
    weights = records.distiller.distill_losses['loss_wsl'].sample_terms['w']
    for sample in data['data_samples']:
        del sample.teacher_answer
    wanted = results(network_, data)
    expected = network_.distiller.distill_losses['loss_wsl'].sample_terms['w']
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found['distill.loss_wsl'], wanted['distill.loss_wsl'], rtol=0.05, atol=0)


def test_the_network_is_not_built(teacher, folders, monkeypatch):
    channels, init = [], CIFARResNet.__init__
    monkeypatch.setattr(
        CIFARResNet, '__init__', lambda self, **kwargs: channels.append(kwargs['stem_channels']) or init(self, **kwargs)
    )
    model = build(cached(live(teacher), folders['all']).model)
    assert channels == [2]  # the student's
    assert type(model.teacher) is CachedTeacher
    assert not list(model.teacher.parameters()) and not any('teacher' in name for name in model.state_dict())


def test_losses_of_mmrazor_are_served(teacher, folders):
    """A top 3 knows those and the true class; what is left at the loss's tau, the other classes share equally."""
    distiller = dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_kd=dict(type='mmrazor.KLDivergence', tau=2.0)))
    network_, records = models(teacher, folders['top 3'], distiller=distiller)
    data = views(folders['top 3'])
    found = results(records, data)['distill.loss_kd']
    for sample in data['data_samples']:
        del sample.teacher_answer
    results(network_, data)
    student = network_.distiller.get_record('hard_loss', from_student=True, data_idx=0)
    soft = (network_.distiller.get_record('logits', from_student=False).double() / 2).softmax(1)
    for row, sample in zip(soft, data['data_samples'], strict=True):
        others = [c for c in range(10) if c not in {*row.topk(3).indices.tolist(), int(sample.gt_label)}]
        row[others] = row[others].mean()
    wanted = 4 * (soft * (soft.log() - (student.detach().double() / 2).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    'recorder',
    [dict(type='ModuleOutputs', source='backbone.layer3'), dict(type='ModuleInputs', source='head')],
    ids=['layer', 'inputs'],
)
def test_layers_are_not_there(teacher, folders, recorder):
    distiller = dict(type='mmwsl.WSLDistiller', teacher_recorders=dict(features=recorder))
    with pytest.raises(ValueError, match=r"logits but no layers, and the teacher's recorder 'features' reads Module"):
        build(cached(live(teacher, distiller=distiller), folders['all']).model)


def test_deliveries_are_not_there(teacher, folders):
    distiller = dict(
        type='mmwsl.WSLDistiller',
        distill_deliveries=dict(mix=dict(type='FunctionOutputs', max_keep_data=1, func_path='torch.randperm')),
    )
    with pytest.raises(ValueError, match=r"nothing to deliver, got distill_deliveries=\['mix'\]"):
        build(cached(live(teacher, distiller=distiller), folders['all']).model)


@pytest.mark.parametrize(
    'taus, match',
    [
        ((4.0,), r'restored at tau in \[2\.0\], not at 4\.0'),
        ((2.0, 4.0), r"one temperature, and the losses have \{'loss_0': 2\.0, 'loss_1': 4\.0\}"),
    ],
)
def test_other_temperatures_are_refused_for_a_top_k(teacher, folders, taus, match):
    distiller = dict(
        type='mmwsl.WSLDistiller',
        distill_losses={f'loss_{i}': dict(type='mmwsl.WSLLoss', tau=tau) for i, tau in enumerate(taus)},
    )
    with pytest.raises(ValueError, match=match):
        build(cached(live(teacher, distiller=distiller), folders['top 3']).model)
    build(cached(live(teacher, distiller=distiller), folders['all']).model)


def test_a_temperature_that_changes_later_is_refused(teacher, folders):
    model = build(cached(live(teacher), folders['top 3']).model)
    model.distiller.distill_losses['loss_wsl'].tau = 3.0
    with pytest.raises(ValueError, match='not at 3'):
        results(model, views(folders['top 3']))


def test_a_copy_follows_its_own_losses(teacher, folders):
    model = build(cached(live(teacher), folders['top 3']).model)
    twin = copy.deepcopy(model)
    model.distiller.distill_losses['loss_wsl'].tau = 3.0
    assert results(twin, views(folders['top 3']))['distill.loss_wsl'] > 0


def test_own_wiring_without_the_recorded_loss_is_refused(teacher, folders):
    wiring = dict(
        preds_S=dict(recorder='hard_loss', from_student=True, data_idx=0),
        preds_T=dict(recorder='logits', from_student=False),
        gt_labels=dict(recorder='hard_loss', from_student=True, data_idx=1),
    )
    distiller = dict(type='mmwsl.WSLDistiller', loss_forward_mappings=dict(loss_wsl=wiring))
    with pytest.raises(ValueError, match=r"loss_wsl needs the teacher's loss as well: add teacher_hard_loss=dict"):
        build(cached(live(teacher, distiller=distiller), folders['float16']).model)
    wiring['teacher_hard_loss'] = dict(recorder='teacher_hard_loss', from_student=False)
    model = build(cached(live(teacher, distiller=distiller), folders['float16']).model)
    assert results(model, views(folders['float16']))['distill.loss_wsl'] > 0


@pytest.mark.parametrize('kind', KINDS)
def test_soft_targets(teacher, folders, kind):
    network_, records = models(teacher, folders[kind])
    data = views(folders[kind])
    for sample in data['data_samples']:
        sample.set_gt_score(0.9 * torch.nn.functional.one_hot(sample.gt_label[0], 10) + 0.01)
    if 'top' in kind:
        with pytest.raises(ValueError, match='class scores.*a top 3 has'):
            results(records, data)
        return
    found = results(records, data)
    for sample in data['data_samples']:
        del sample.teacher_answer
    torch.testing.assert_close(found, results(network_, data), rtol=5e-3, atol=5e-3)


def test_samples_without_records(teacher, folders):
    dataset = SeededViews(live(teacher).train_dataloader.dataset.dataset)
    data = default_collate([dataset[View(image, 0, 0)] for image in range(4)])
    model = build(cached(live(teacher), folders['all']).model)
    with pytest.raises(CacheError, match=r'have no cached answers.*should be a mmwsl\.CachedViews'):
        results(model, data)


def test_records_without_a_cached_teacher(teacher, folders):
    with pytest.raises(CacheError, match='have cached answers of a teacher, and the model runs its'):
        results(build(live(teacher).model), views(folders['all']))


def test_records_of_another_cache(teacher, folders):
    model = build(cached(live(teacher), folders['all']).model)
    with pytest.raises(CacheError, match='answers come from another cache'):
        results(model, views(folders['float16']))


@pytest.mark.parametrize(
    'other, field',
    [
        (dict(teacher_norm_eval=False), 'teacher.teacher_norm_eval is True in the cache and False here'),
        (dict(teacher=network(8)), 'teacher.config.backbone.stem_channels is 4 in the cache and 8 here'),
        (
            dict(data_preprocessor=dict(PREPROCESSOR, mean=[5.0])),
            r'teacher.data_preprocessor.mean.0 is 4\.9\d* in the cache and 5\.0 here',
        ),
    ],
)
def test_another_teacher_is_refused(teacher, folders, other, field):
    with pytest.raises(CacheError, match=field):
        build(cached(live(teacher, **other), folders['all']).model)


def test_other_weights_are_refused(tmp_path, folders):
    with pytest.raises(CacheError, match=r'teacher\.weights is'):
        build(cached(live(save_teacher(tmp_path / 'other.pth', seed=3)), folders['all']).model)


def test_without_the_teachers_file_all_else_is_compared(tmp_path, folders):
    nowhere = str(tmp_path / 'moved_away.pth')
    build(cached(live(nowhere), folders['all']).model)
    with pytest.raises(CacheError, match='backbone.stem_channels'):
        build(cached(live(nowhere, teacher=network(8)), folders['all']).model)


@pytest.mark.parametrize('place', ['moved_away.pth', 'https://example.invalid/teacher.pth'])
def test_a_file_that_is_not_here_is_neither_fetched_nor_compared_with_its_hash(tmp_path, folders, monkeypatch, place):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda *_, **__: pytest.fail('it was fetched'))
    model = build(cached(live(place, teacher_sha256='0' * 8), folders['all']).model)
    assert model.teacher_sha256 == []


def test_a_cached_teachers_file_is_compared_with_its_hash(teacher, folders):
    with pytest.raises(ValueError, match='is not the file that model.teacher_sha256 names'):
        build(cached(live(teacher, teacher_sha256='0' * 8), folders['all']).model)


def test_a_built_network_cannot_be_compared(teacher, folders):
    cfg = cached(live(teacher), folders['all']).model
    with pytest.raises(ValueError, match='teacher should be the config that was cached'):
        build(dict(cfg, teacher=build(network(4))))


def test_another_network_cannot_take_its_place(teacher, folders):
    model = build(cached(live(teacher), folders['all']).model)
    with pytest.raises(ValueError, match='a cached teacher cannot be replaced.*build the model without teacher_cache'):
        model.teacher = build(network(4))
    assert type(model.teacher) is CachedTeacher


def test_mixing_is_refused(teacher, folders):
    mixing = dict(augments=[dict(type='mmpretrain.CutMix', alpha=1.0)])
    cfg = cached(live(teacher, data_preprocessor=dict(PREPROCESSOR, batch_augments=mixing)), folders['all'])
    with pytest.raises(ValueError, match='CutMix mixes images, and a teacher cache holds answers to single images'):
        build(cfg.model)


def test_the_check_of_the_teacher_judges_its_records(tmp_path, teacher, folders):
    cfg = cached(live(teacher, tmp_path), folders['all'])
    cfg.custom_hooks = [dict(type='mmwsl.CheckTeacherHook')]
    from mmengine.runner import Runner

    with pytest.raises(RuntimeError, match=r'of 200 cached views of training images right; chance is 10\.00 %'):
        Runner.from_cfg(cfg).train()
    cfg.custom_hooks = [dict(type='mmwsl.CheckTeacherHook', min_accuracy=0)]
    cfg.experiment_name = 'again'
    Runner.from_cfg(cfg).train()
    top1 = CachedTeacher(str(folders['all'])).top1
    log = max(tmp_path.glob('*/*.log'), key=lambda path: path.stat().st_mtime_ns).read_text()
    assert f'Teacher: {100 * top1:.2f} % top-1 on 200 cached views of training images.' in log
