"""A step under torch.compile: one graph, and the same numbers as without."""

import copy
import functools
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.logging import MessageHub
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner

from mmwsl.datasets.views import View
from mmwsl.models.losses import Call
from mmwsl.models.teachers import recording
from tests.caches import cached, live, make_cache
from tests.tiny import (
    PREPROCESSOR,
    ROOT,
    Graphs,
    batch,
    build,
    digits_config,
    distillation,
    losses,
    network,
    save_teacher,
)

pytestmark = pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
CLASS_METHOD = 'mmpretrain.models.heads.cls_head.ClsHead._get_loss'


def images(step, size=4, channels=1, side=8, classes=10):
    """A batch as a dataset makes it: each image with an index and a path of its own."""
    data = batch(size, seed=step, channels=channels, classes=classes)
    data['inputs'] = data['inputs'].repeat_interleave(side // 8, 2).repeat_interleave(side // 8, 3)
    for place, sample in enumerate(data['data_samples']):
        sample.set_metainfo(dict(sample_idx=step * size + place, img_path=f'{step}/{place}.png'))
    return data


# ---- every pair in configs/


def is_distillation(cfg):
    """Without files that others have to make first; what looks images up is traced for each batch."""
    model = cfg.get('model', {})
    return model.get('type') == 'mmwsl.WSLDistill' and not {'teacher_cache', 'teacher_losses'} & set(
        re.findall(r'\w+', str(model))
    )


@functools.cache
def pairs():
    """Names of configs that have, between them, all pairs of networks and all losses: one of each is enough."""
    found, seen = [], set()
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        other_task = {'_base_', 'det', 'multi', 'seg'} & set(path.relative_to(ROOT / 'configs').parts)
        cfg = Config.fromfile(path) if not other_task else {}
        if is_distillation(cfg):
            networks = str((cfg.model.architecture, cfg.model.teacher))
            loss = str((cfg.model.distiller.get('distill_losses'), cfg.model.get('teacher_norm_eval', True)))
            if not {networks, loss} <= seen:
                found.append(path.relative_to(ROOT / 'configs').with_suffix('').as_posix())
            seen |= {networks, loss}
    return found


def quick_and_slow(names):
    return [
        pytest.param(name, marks=() if 'digits' in name or name == 'wsl_r56_r20_cifar100' else pytest.mark.slow)
        for name in names
    ]


@pytest.fixture
def in_epoch():
    """Tells losses the epoch, as a run does."""
    hub = MessageHub.get_current_instance()
    yield lambda epoch: hub.update_info('epoch', epoch)
    hub.pop_info('epoch', None)


@pytest.mark.parametrize('name', quick_and_slow(pairs()))
def test_step_of_a_pair_is_one_graph(name, in_epoch):
    in_epoch(0)
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.model.teacher_ckpt = None
    cfg.model.teacher.pop('ckpts', None)
    model = MODELS.build({'data_preprocessor': cfg.data_preprocessor, **cfg.model})
    model.train()
    graphs = Graphs().compile(model)
    kind = dict(channels=1) if 'digits' in name else dict(channels=3, side=224 if 'swin' in name else 32)
    for step in range(3):
        total, _ = model.parse_losses(losses(model, images(step, 2, **kind)))
        assert (graphs.made, graphs.runs) == (1, step + 1)
    assert torch.isfinite(total)


# ---- every kind of teacher, and whatever else a graph has to carry


def of(**kwargs):
    return build(distillation(**kwargs))


def ensemble():
    return dict(type='mmwsl.EnsembleTeacher', models=[network(4), network(2)])


TEACHERS = {
    'eval': {},
    'plain': dict(teacher_speed='plain'),
    'bf16': dict(teacher_speed='bf16'),
    'batch statistics': dict(teacher_norm_eval=False),
    'ensemble': dict(teacher=ensemble()),
    'own input': dict(teacher=network(4, data_preprocessor=dict(PREPROCESSOR, mean=[1.0], std=[3.0]))),
}
LOSSES = {
    'feature': dict(
        student_recorders=dict(features=dict(type='ModuleOutputs', source='backbone.layer3.0.bn2')),
        teacher_recorders=dict(features=dict(type='ModuleOutputs', source='backbone.layer3.0.bn2')),
        connectors=dict(widen=dict(type='ConvModuleConnector', in_channel=8, out_channel=16)),
        distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss'), loss_features=dict(type='L2Loss')),
        loss_forward_mappings=dict(
            loss_features=dict(
                s_feature=dict(recorder='features', from_student=True, connector='widen'),
                t_feature=dict(recorder='features', from_student=False),
            )
        ),
    ),
    'standardised': dict(
        distill_losses=dict(
            loss_kd=dict(
                type='mmwsl.WeightedLoss',
                loss=dict(type='Standardized', loss=dict(type='DKD')),
                weighting=dict(type='EntropyWeighting'),
            )
        )
    ),
    'scale-free': dict(
        distill_losses=dict(
            loss_kd=dict(
                type='mmwsl.WeightedLoss', loss=dict(type='TTM'), weighting=dict(type='WSLWeighting', scale_free=True)
            )
        )
    ),
}


def steps_of(model, made=images, compiled=False):
    """Losses and gradients of three steps, and the graphs made and run."""
    model.train()
    graphs = Graphs()
    if compiled:
        graphs.compile(model)
    found = []
    for step in range(3):
        model.zero_grad()
        total, logged = model.parse_losses(losses(model, made(step)))
        total.backward()
        found.append([*logged.values(), *(parameter.grad for parameter in model.student.parameters())])
    return found, (graphs.made, graphs.runs)


def assert_one_graph_of_the_same_numbers(make, made=images):
    torch.manual_seed(1)
    expected, _ = steps_of(make(), made)
    torch.manual_seed(1)
    found, graphs = steps_of(make(), made, compiled=True)
    assert graphs == (1, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', TEACHERS)
def test_step_with_a_kind_of_teacher_is_one_graph(kind):
    assert_one_graph_of_the_same_numbers(lambda: of(**TEACHERS[kind]))


@pytest.mark.parametrize('kind', LOSSES)
def test_step_with_other_losses_is_one_graph(kind):
    assert_one_graph_of_the_same_numbers(lambda: of(distiller=dict(type='mmwsl.WSLDistiller', **LOSSES[kind])))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_step_with_a_cached_teacher_is_one_graph(tmp_path, dtype):
    teacher = save_teacher(tmp_path / 'teacher.pth')
    folder = make_cache(tmp_path / 'cache', live(teacher), dtype=dtype)
    cfg = cached(live(teacher), folder)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert_one_graph_of_the_same_numbers(
        lambda: build(cfg.model), lambda step: default_collate([dataset[View(place, 1, 99)] for place in range(4)])
    )


def test_step_with_mixed_images_is_one_graph():
    mixed = dict(PREPROCESSOR, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8)]))
    assert steps_of(of(data_preprocessor=mixed), compiled=True)[1] == (1, 3)


def test_a_compiled_model_is_one_graph():
    model = of()
    model.train()
    expected = [losses(model, images(step)) for step in range(2)]
    graphs = Graphs()
    whole = torch.compile(model, backend=graphs)
    for step in range(2):
        found = whole(**model.data_preprocessor(images(step), True), mode='loss')
        torch.testing.assert_close(found, expected[step], rtol=1e-4, atol=1e-5)
        assert (graphs.made, graphs.runs) == (1, step + 1)


def test_in_a_run_of_mmengine_that_compiles_both_networks_are_in_one_graph(tmp_path):
    graphs = Graphs()
    hooks = [dict(type='mmwsl.EpochSeedHook'), dict(type='mmwsl.LossStatisticsHook')]
    cfg = digits_config(
        tmp_path,
        distillation(),
        2,
        custom_hooks=hooks,
        train_dataloader=dict(batch_size=60),
        default_hooks=dict(logger=dict(interval=20)),
        log_processor=dict(window_size=1),
    )
    torch._dynamo.register_backend(graphs, name='graphs')  # a config holds only data
    cfg.compile = dict(backend='graphs')
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model
    convolutions = sum(
        isinstance(module, torch.nn.Conv2d)
        for network in (model.student, model.teacher)
        for module in network.modules()
    )
    assert convolutions == 18
    # with statistics and without
    assert [count for count in graphs.convolutions if count] == [convolutions] * 2


def test_the_step_after_a_change_of_the_teacher_is_taught_by_the_changed_one():
    model = of(calculate_student_loss=False)
    model.train()
    Graphs().compile(model)
    before = losses(model, images(0))['distill.loss_wsl']
    model.teacher.head.fc.weight.data.mul_(50)
    changed = losses(model, images(0))['distill.loss_wsl']
    logits = model.distiller.get_record('logits', from_student=False)
    inputs = model.data_preprocessor(images(0), True)['inputs']
    torch.testing.assert_close(logits, model.teacher(inputs))
    assert not torch.allclose(before, changed)


def test_a_warm_up_compiles_twice_and_no_more(in_epoch):
    loss = dict(type='mmwsl.WeightedLoss', loss=dict(type='TTM'), warmup_epochs=20)
    model = of(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_kd=loss)))
    model.train()
    graphs, found = Graphs().compile(model), []
    for epoch in (0, 1, 4, 9, 19, 30):
        in_epoch(epoch)
        model.student.load_state_dict(model.student.state_dict())
        found.append(losses(model, images(0))['distill.loss_kd'].item())
    assert (graphs.made, graphs.runs) == (2, 6)
    assert [value / found[-1] for value in found] == pytest.approx([0.05, 0.1, 0.25, 0.5, 1, 1], rel=1e-5)


def test_a_wrong_label_is_reported():
    model = of()
    model.train()
    Graphs().compile(model)
    data = images(0)
    losses(model, data)
    data['data_samples'][0].set_gt_label(10)
    with pytest.raises((RuntimeError, IndexError), match='class index is not in|out of bounds'):
        losses(model, data)


def test_what_breaks_the_graph_is_said_once(monkeypatch):
    said = []
    recording._tell.__wrapped__.cache_clear()
    monkeypatch.setattr(recording, 'print_log', lambda message, *_: said.append(message))
    recorders = dict(answer=dict(type='MethodOutputs', source=CLASS_METHOD))
    model = of(distiller=dict(type='mmwsl.WSLDistiller', student_recorders=recorders))
    model.train()
    losses(model, images(0))
    assert not said
    graphs = Graphs().compile(model)
    for step in range(2):
        found = losses(model, images(step))
        (answer,) = model.distiller.student_recorders.get_recorder('answer').data_buffer
        torch.testing.assert_close(answer['loss'], found['student.loss'].detach())
    assert graphs.made > 1
    assert len(said) == 1 and "'answer' (MethodOutputsRecorder)" in said[0]


def test_a_delivery_breaks_the_graph_and_still_delivers():
    def make():
        torch.manual_seed(1)
        deliveries = dict(loss=dict(type='MethodOutputs', max_keep_data=1, method_path=CLASS_METHOD))
        wiring = dict(
            preds_S=dict(recorder='logits', from_student=True), preds_T=dict(recorder='logits', from_student=False)
        )
        return of(
            distiller=dict(
                type='mmwsl.WSLDistiller',
                distill_deliveries=deliveries,
                student_recorders=dict(logits=dict(type='ModuleOutputs', source='head')),
                distill_losses=dict(loss_kd=dict(type='KLDivergence')),
                loss_forward_mappings=dict(loss_kd=wiring),
            )
        )

    expected, _ = steps_of(make())
    found, (made, _) = steps_of(make(), compiled=True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert made > 1


def test_statistics_are_computed_in_the_graph_alone(monkeypatch):
    computed, statistics = [], Call.statistics
    model = of()
    model.train()
    Graphs().compile(model)
    losses(model, images(0))
    monkeypatch.setattr(Call, 'statistics', lambda call: computed.append(call) or statistics(call))
    losses(model, images(0))
    computed.clear()  # it has been traced again
    losses(model, images(1))
    assert not computed


# ---- modules that are replaced under a recorder


def test_recorder_reads_the_norm_layer_that_replaced_its_own():
    recorders = dict(features=dict(type='ModuleOutputs', source='backbone.bn1'))
    model = of(distiller=dict(type='mmwsl.WSLDistiller', student_recorders=recorders))
    convert_sync_batchnorm(model, 'torch')
    model.train()
    assert type(model.student.backbone.bn1) is torch.nn.SyncBatchNorm
    model.student.eval()  # on a CPU it trains not
    for _ in range(2):
        losses(model, images(0))
        (recorded,) = model.distiller.student_recorders.get_recorder('features').data_buffer
        assert recorded.shape == (4, 2, 8, 8)


def test_recorder_reads_a_layer_of_the_teacher_that_replaced_its_own():
    model = of()
    model.teacher.head = MODELS.build(network(4)['head'])
    model.train()
    losses(model, images(0))
    inputs = model.data_preprocessor(images(0), True)['inputs']
    torch.testing.assert_close(model.distiller.get_record('logits', from_student=False), model.teacher(inputs))


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize(('kind', 'compiled'), [*((kind, False) for kind in TEACHERS), ('eval', True)])
def test_cuda_step_agrees_with_the_cpu_and_is_not_waited_for(kind, compiled):
    torch.manual_seed(1)
    model = of(**TEACHERS[kind])
    model.train()
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu.train()
    if compiled:
        on_gpu.forward = torch.compile(on_gpu.forward)
    for step in range(3):  # the first chooses a teacher, the second has it
        expected, data = losses(model, images(step)), images(step)
        data['inputs'] = data['inputs'].pin_memory()
        torch.cuda.set_sync_debug_mode('error' if step == 2 else 'default')
        try:
            found = losses(on_gpu, data)
        finally:
            torch.cuda.set_sync_debug_mode('default')
        for name in ('student.loss', 'distill.loss_wsl'):  # convolutions round to TF32
            torch.testing.assert_close(found[name].cpu(), expected[name], rtol=0.02, atol=0)
