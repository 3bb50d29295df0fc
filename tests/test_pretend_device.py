"""A step on a GPU: everything is there, nothing is read back, and nothing comes from memory that is not pinned."""

import copy
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.hooks import LoggerHook
from mmengine.registry import DATASETS
from mmpretrain.structures import DataSample
from torch._subclasses.fake_tensor import FakeTensor

from mmwsl import functional
from mmwsl.datasets import DeviceDataset
from mmwsl.datasets.views import View
from mmwsl.engine.hooks import CheckTeacherHook, LateScalarsHook, SampleRecordHook, check_teacher_hook
from mmwsl.models.losses import WeightedLoss, WSLLoss
from mmwsl.models.teachers import fast
from mmwsl.models.weightings import ShuffledWeighting
from tests.caches import cached, live, make_cache
from tests.pretend_device import DataDependentOutputException, pretend, why_not
from tests.test_models.test_losses.references import LOSSES, PAIRS, WEIGHTINGS, teacher_losses
from tests.tiny import PREPROCESSOR, ROOT, Graphs, batch, build, distillation, network, save_teacher

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.filterwarnings('ignore:teacher_ckpt is None'),
]
NEEDS_TRITON = pytest.mark.skipif(find_spec('triton') is None, reason='needs the extra triton')
OWN_INPUT = dict(teacher=network(4, data_preprocessor=dict(PREPROCESSOR, mean=[1.0], std=[3.0])))
# but for teacher_speed='bf16', see halved
TEACHERS = {
    'eval': {},
    'plain': dict(teacher_speed='plain'),
    'batch statistics': dict(teacher_norm_eval=False),
    'ensemble': dict(teacher=dict(type='mmwsl.EnsembleTeacher', models=[network(4), network(2)])),
    'own input': OWN_INPUT,
    'plain, own input': dict(OWN_INPUT, teacher_speed='plain'),
}


@contextmanager
def on_device(monkeypatch, counts=True):
    # the values of a teacher's copy are compared once, before it is taken: what is shown here is where they are
    monkeypatch.setattr(fast, '_is_finite', lambda output: True)
    monkeypatch.setattr(fast, '_is_right_in_use', lambda *_: True)
    monkeypatch.setattr(fast, '_milliseconds', lambda network, _: 1.0 + bool(norms(network)))
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: True)
    monkeypatch.setattr(fast, '_are_close', lambda _, leaf, expected: leaf.device == expected.device)
    with pretend(monkeypatch, counts) as device:
        yield device


@pytest.fixture
def device(monkeypatch):
    with on_device(monkeypatch) as device:
        yield device


@contextmanager
def autocast(dtype):
    """torch.autocast switches itself off on a build without CUDA."""
    if dtype is None:
        yield
        return
    torch.set_autocast_enabled('cuda', True), torch.set_autocast_dtype('cuda', dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled('cuda', False), torch.clear_autocast_cache()


def loaded(device, data):
    """A batch as a dataloader with pin_memory hands it over: it pins images, and nothing within DataSamples."""
    samples = []
    for sample in data['data_samples']:
        samples.append(DataSample(metainfo=dict(sample_idx=len(samples))))
        samples[-1].set_field(device.tensor(sample.gt_label), 'gt_label')
        if 'teacher_answer' in sample:
            samples[-1].set_field(sample.teacher_answer, 'teacher_answer')
    return dict(inputs=device.pinned(device.tensor(data['inputs'])), data_samples=samples)


def step(device, model, data, dtype=None):
    """What a step of mmengine does but for the backward pass, which needs a device; returns what it logs."""
    wrapper = SimpleNamespace(optim_context=lambda _: autocast(dtype), update_params=lambda loss: None)
    device.clear()
    return model.train_step(loaded(device, data), wrapper)


def first_step(device, model, data):
    """A step with copies of its own: the map between two kinds of input is on the CPU until then."""
    device.fake.allow_non_fake_inputs = True
    step(device, model, data)
    device.fake.allow_non_fake_inputs = False


def assert_nothing_waits(copies):
    assert all(pinned and goes_on for _, pinned, goes_on in copies), copies


# ---- the pretence itself


def test_wrong_devices_and_values_read_back_raise(device):
    there, here = torch.ones(2, device='cuda', requires_grad=True), torch.ones(2)
    with pytest.raises(RuntimeError, match='different devices|two devices'):
        there + here
    for read in (lambda: there.sum().item(), lambda: bool(there.sum() > 0), lambda: there.detach().tolist()):
        with pytest.raises(DataDependentOutputException):
            read()


def test_copies_are_told_apart(device):
    image = torch.ones(2, 3)
    image.to('cuda'), image.pin_memory().to('cuda', non_blocking=True), image.pin_memory()[:1].cuda()
    torch.empty(2, 3, device='cuda').copy_(image)
    torch.ones(2, device='cuda').to(torch.float64)
    pageable = ((2, 3), False, False)
    assert device.copies == [pageable, ((2, 3), True, True), ((1, 3), True, False), pageable]


# ---- a step


@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16], ids=['float32', 'float16', 'bfloat16'])
@pytest.mark.parametrize('kind', TEACHERS)
def test_step_is_on_the_device_and_waits_for_nothing(kind, dtype, monkeypatch):
    model = build(distillation(**TEACHERS[kind]))
    model.train()
    data = batch(4)
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        first_step(device, model, data)
        logged = step(device, model, data, dtype)
    assert {value.device.type for value in logged.values()} == {'cuda'}
    assert_nothing_waits(device.copies)
    assert [shape for shape, _, _ in device.copies] == [(4,), (4, 1, 8, 8)]  # labels and images


@pytest.mark.parametrize('kind', TEACHERS)
def test_step_is_one_graph(kind, monkeypatch):
    model, data = build(distillation(**TEACHERS[kind])), batch(4)
    model.train()
    with on_device(monkeypatch, counts=False) as device:
        device.to_cuda(model)
        assert_one_graph(device, model, data)


def assert_one_graph(device, model, data):
    first_step(device, model, data)
    graphs = Graphs().compile(model)
    for count in (1, 2):
        step(device, model, data)
        assert (graphs.made, graphs.runs) == (1, count)


def in_bf16(monkeypatch):
    """A model whose teacher runs in bfloat16, and the copy that it takes: torch converts no copy of such tensors."""
    model = build(distillation(teacher_speed='bf16')).train()
    half = copy.deepcopy(model.teacher).to(torch.bfloat16)
    monkeypatch.setattr(fast, '_in_bf16', lambda *_: half)
    return model, half


@pytest.mark.parametrize('dtype', [None, torch.float16, torch.bfloat16], ids=['float32', 'float16', 'bfloat16'])
def test_step_with_a_teacher_in_bf16_waits_for_nothing(dtype, monkeypatch):
    model, half = in_bf16(monkeypatch)
    data, seen = batch(4), []
    with on_device(monkeypatch) as device:
        device.to_cuda(model), device.to_cuda(half)
        half.head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
        first_step(device, model, data)
        step(device, model, data, dtype)
    assert set(seen) == {torch.bfloat16}
    assert_nothing_waits(device.copies)


def test_step_with_a_teacher_in_bf16_is_one_graph(monkeypatch):
    (model, half), data = in_bf16(monkeypatch), batch(4)
    with on_device(monkeypatch, counts=False) as device:
        device.to_cuda(model), device.to_cuda(half)
        assert_one_graph(device, model, data)


@contextmanager
def cached_on_device(tmp_path, monkeypatch, record, counts):
    """A model that learns from a cache, on the device, and images that it has."""
    teacher = save_teacher(tmp_path / 'teacher.pth')
    cfg = cached(live(teacher), make_cache(tmp_path / 'cache', live(teacher), dtype=record))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    model, data = build(cfg.model), default_collate([dataset[View(place, 1, 99)] for place in range(4)])
    form = type(model.teacher.cache.manifest.answer_format)
    records = model.teacher._stacked(data['data_samples'])
    answers = [
        getattr(form, name)(model.teacher.cache.manifest.answer_format, records) for name in ('decode', 'hard_loss')
    ]
    model.train()
    with on_device(monkeypatch, counts) as device:
        for name, answer in zip(('decode', 'hard_loss'), map(device.tensor, answers), strict=True):  # made by numpy
            monkeypatch.setattr(form, name, lambda *_, answer=answer: answer)
        device.to_cuda(model)
        yield device, model, data


@pytest.mark.parametrize('record', ['float32', 'float16'])
def test_step_with_a_cached_teacher_waits_for_nothing(tmp_path, monkeypatch, record):
    with cached_on_device(tmp_path, monkeypatch, record, counts=True) as (device, model, data):
        first_step(device, model, data)
        step(device, model, data)
    assert_nothing_waits(device.copies)
    of_records = [(4, 10)] if record == 'float32' else [(4, 10), (4,)]
    assert [shape for shape, _, _ in device.copies] == [(4,), (4, 1, 8, 8), *of_records]


@pytest.mark.parametrize('record', ['float32', 'float16'])
def test_step_with_a_cached_teacher_is_one_graph(tmp_path, monkeypatch, record):
    with cached_on_device(tmp_path, monkeypatch, record, counts=False) as (device, model, data):
        assert_one_graph(device, model, data)


def test_mixed_labels_are_made_on_the_device(monkeypatch):
    mixed = dict(PREPROCESSOR, batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8)]))
    model, data = build(distillation(data_preprocessor=mixed)), batch(4)
    model.train()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        first_step(device, model, data)
        step(device, model, data)
    assert_nothing_waits(device.copies)  # but for the permutation, by which mmpretrain's Mixup indexes from the CPU
    assert [shape for shape, _, _ in device.copies] == [(4,), (4, 1, 8, 8)]


def test_dataset_on_the_device_copies_two_pinned_lists_of_numbers(monkeypatch):
    images = [dict(inputs=image, data_samples=sample) for image, sample in zip(*batch(9).values(), strict=True)]
    plain = type('Images', (list,), {'metainfo': {}})(images)
    dataset = DeviceDataset(plain, padding=1, flip_prob=0.5, device='cpu')
    from_numpy = torch.from_numpy
    with on_device(monkeypatch) as device:
        dataset.images, dataset.labels = (device.tensor(tensor).cuda() for tensor in (dataset.images, dataset.labels))
        monkeypatch.setattr(torch, 'from_numpy', lambda array: device.tensor(from_numpy(array)))
        device.clear()
        found = dataset.__getitems__([View(place, 1, 99) for place in range(4)])
    assert {
        tensor.device.type for tensor in (found['inputs'], *(sample.gt_label for sample in found['data_samples']))
    } == {'cuda'}
    assert_nothing_waits(device.copies)
    assert [shape for shape, _, _ in device.copies] == [(4,), (3, 4)]


# ---- what a step of ResNet-56 -> ResNet-20 takes, and MMRazor's


def pair(name, **changes):
    """The networks of a config, without weights; with the algorithm of another on demand."""
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    model = {**cfg.model, 'data_preprocessor': cfg.data_preprocessor, **changes}
    return build({**model, 'teacher_ckpt': None} if 'teacher' in model else model)


def of_mmrazor():
    model = Config.fromfile(ROOT / 'configs/mmrazor_r56_r20_cifar100_8e.py').model
    return pair('wsl_r56_r20_cifar100', type=model.type, distiller=model.distiller, teacher_norm_eval=True)


STEPS = {
    'student alone': (lambda: pair('vanilla/r20_cifar100'), 109, 2),
    'WSL, teacher in eval mode': (lambda: pair('wsl_r56_r20_cifar100', teacher_norm_eval=True), 332, 0),
    'WSL, teacher with batch statistics': (lambda: pair('wsl_r56_r20_cifar100'), 389, 0),
    "MMRazor's SingleTeacherDistill with WSLD": (of_mmrazor, 346, 2),
}


@pytest.mark.parametrize('name', STEPS)
def test_operations_and_copies_of_a_step_are_those_of_the_page(name, monkeypatch):
    make, operations, waits = STEPS[name]
    model, data = make(), batch(64, channels=3, classes=100)
    data['inputs'] = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    model.train()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        first_step(device, model, data)
        step(device, model, data)
    found = sum(not (pinned and goes_on) for _, pinned, goes_on in device.copies)
    assert (device.operations.total(), len(device.copies), found) == (operations, 2, waits)
    assert f'| {name} | {operations} | 2 | {waits} |' in (ROOT / 'docs/gpu.md').read_text()


# ---- which form of a teacher is taken


def norms(network):
    return [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def is_channels_last(network):
    return network.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(('folded', 'channels_last'), [(True, True), (True, False), (False, True), (False, False)])
def test_the_fastest_form_is_taken_and_may_be_the_teacher_itself(monkeypatch, folded, channels_last):
    networks, runner = [], fast._runner
    monkeypatch.setattr(fast, '_runner', lambda network, half: networks.append(network) or runner(network, half))
    model, data = build(distillation()), batch(4)
    model.train()
    with on_device(monkeypatch) as device:
        monkeypatch.setattr(
            fast,
            '_milliseconds',
            lambda network, _: 1.0 + (bool(norms(network)) == folded) + (is_channels_last(network) != channels_last),
        )
        device.to_cuda(model)
        first_step(device, model, data)
        found = [(not norms(network), is_channels_last(network)) for network in networks]
    assert found == ([(folded, channels_last)] if folded or channels_last else [])


def test_a_card_without_bfloat16_is_named(monkeypatch):
    model, data = build(distillation(teacher_speed='bf16')), batch(4)
    model.train()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: False)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'Old Card')
        with pytest.warns(UserWarning, match='runs in float32, because the Old Card does not support bfloat16'):
            first_step(device, model, data)


@pytest.mark.parametrize('kind', ['eval', 'own input', 'ensemble'])
def test_the_teachers_check_reads_nothing_but_what_it_has_copied_to_the_cpu(kind, monkeypatch):
    def read(value):
        def stub(tensor):
            assert tensor.device.type == 'cpu'
            return value

        return stub

    model, data = build(distillation(**TEACHERS[kind])), batch(4)
    model.eval()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        device.fake.allow_non_fake_inputs = True  # the mean and deviation of its other kinds of input are lists
        for name, value in (('tolist', [3, 4, 0]), ('__float__', 0.75), ('__int__', 10)):
            monkeypatch.setattr(FakeTensor, name, read(value), raising=False)
        monkeypatch.setattr(check_teacher_hook, '_check_finite', lambda logits: None)
        monkeypatch.setattr(check_teacher_hook, 'some_batches', lambda *_: [loaded(device, data)])
        runner = SimpleNamespace(model=model, val_loop=SimpleNamespace(dataloader=None))
        with torch.no_grad():
            score = CheckTeacherHook()._score(runner, model)
    assert score == (0.75, 4, 10)


# ---- losses and weightings


@pytest.fixture
def _drawn(monkeypatch):
    """A build without CUDA has no generator for it but torch's own."""
    monkeypatch.setattr(ShuffledWeighting, '_drawn_from', lambda *_: None)


CONFIGS = [(LOSSES[loss].config, WEIGHTINGS[weighting].config) for loss, weighting in PAIRS]
CONFIGS += [
    (LOSSES['SoftCrossEntropy'].config, config)
    for config in (dict(type='ShuffledWeighting'), dict(type='MeanWeighting'), dict(type='RegularizationWeighting'))
]


@pytest.mark.usefixtures('_drawn')
@pytest.mark.parametrize(
    ('dtype', 'shape'),
    [(torch.float32, (4, 10)), (torch.float32, (2, 10, 3, 3)), (torch.float16, (4, 10)), (torch.bfloat16, (4, 10))],
    ids=str,
)
def test_losses_under_weightings_read_nothing_and_copy_nothing(dtype, shape, monkeypatch):
    teacher_losses(monkeypatch)
    samples = [SimpleNamespace(metainfo=dict(sample_idx=0)) for _ in range(shape[0])]
    built = [WeightedLoss(*config) for config in CONFIGS]
    with pretend(monkeypatch) as device:
        for loss in built:
            device.to_cuda(loss)
        preds_S, preds_T = torch.randn(2, *shape, device='cuda', dtype=dtype)
        target = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device='cuda')
        for loss in built:
            if len(shape) > 2 and loss.sample_weighting.per_image:
                continue
            value = loss(preds_S.detach().requires_grad_(), preds_T, target, data_samples=samples)
            assert value.device.type == 'cuda' and value.dtype == torch.float32 and value.requires_grad
            assert {value.device.type for value in loss.statistics.values()} == {'cuda'}
    assert_nothing_waits(device.copies)


@pytest.mark.parametrize(
    ('compile', 'name', 'terms'),
    [(False, '_SoftTermsBackward', 4), pytest.param('triton', '_KernelTermsBackward', 5, marks=NEEDS_TRITON)],
)
def test_gradient_of_the_loss_is_on_the_device(device, compile, name, terms):
    preds = torch.randn(4, 10, device='cuda', requires_grad=True)
    loss = WSLLoss(compile=compile)(preds, preds.detach(), torch.zeros(4, dtype=torch.int64, device='cuda'))
    node = loss.grad_fn
    while type(node).__name__ != name:  # the engine needs a device
        node = node.next_functions[0][0]
    with torch.no_grad():
        gradient, *_ = node.apply(torch.ones(4, device='cuda'), *[None] * (terms - 1))
    assert gradient.device.type == 'cuda' and gradient.shape == (4, 10)
    assert not device.copies


@pytest.mark.parametrize('name', ['weight', 'avg_factor', 'teacher_hard_loss'])
def test_what_comes_with_a_loss_may_be_on_the_device(device, name):
    preds, target = torch.randn(4, 10, device='cuda'), torch.zeros(4, dtype=torch.int64, device='cuda')
    given = torch.ones((), device='cuda') if name == 'avg_factor' else torch.ones(4, device='cuda')
    assert WSLLoss()(preds, preds, target, **{name: given}).device.type == 'cuda'
    assert not device.copies


def test_scores_are_checked_without_a_look(device):
    scores = torch.full((4, 10), 0.1, device='cuda')
    assert WSLLoss()(torch.randn(4, 10, device='cuda'), torch.randn(4, 10, device='cuda'), scores).device.type == 'cuda'
    functional.check_label_scores(scores)


@pytest.mark.parametrize(('compile', 'operations'), [(False, 40), pytest.param('triton', 8, marks=NEEDS_TRITON)])
def test_operations_of_a_loss(device, compile, operations):
    """Launches of a step without torch.compile, and without the backward pass."""
    preds, target = torch.randn(64, 100, device='cuda'), torch.zeros(64, dtype=torch.int64, device='cuda')
    loss = WSLLoss(compile=compile)
    device.clear()
    loss(preds.requires_grad_(), preds.detach(), target)
    assert device.operations.total() <= operations, device.operations
    device.clear()
    assert loss.statistics
    assert device.operations.total() <= 31, device.operations


# ---- hooks


def runner_with(model, steps=4, interval=2):
    hub = SimpleNamespace(
        scalars=[], update_info=lambda *_: None, update_scalar=lambda name, value: hub.scalars.append((name, value))
    )
    loader = type('Loader', (list,), {'dataset': None})(range(steps))
    return SimpleNamespace(
        model=model,
        hooks=[LoggerHook(interval=interval)],
        train_loop=None,
        epoch=0,
        iter=0,
        max_epochs=1,
        max_iters=steps,
        train_dataloader=loader,
        message_hub=hub,
    )


def test_scalars_are_read_at_the_loggers_turn_alone(monkeypatch):
    model, data = build(distillation()), batch(4)
    model.train()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        first_step(device, model, data)
        logged = step(device, model, data)
        hook, runner = LateScalarsHook(), runner_with(model)
        hook.before_train(runner)
        hook.after_train_iter(runner, 0, outputs=logged)
        assert not runner.message_hub.scalars
        with pytest.raises(DataDependentOutputException):
            hook.after_train_iter(runner, 1, outputs=logged)


def test_records_of_samples_stay_on_the_device_until_the_loggers_turn(monkeypatch):
    model, data = build(distillation()), batch(4)
    model.train()
    with on_device(monkeypatch) as device:
        device.to_cuda(model)
        first_step(device, model, data)
        hook, runner = SampleRecordHook(), runner_with(model)
        hook.before_train(runner), hook.before_train_epoch(runner)
        step(device, model, data)
        device.clear()
        hook.after_train_iter(runner, 0, loaded(device, data))
    assert hook.terms[0].device.type == 'cuda' and hook.terms[0].shape == (6, 4)
    assert not device.copies
