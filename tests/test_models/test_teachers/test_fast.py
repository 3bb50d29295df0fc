"""The fast teacher: which one it is, and that it says what the plain one says."""

import copy
import pickle
import warnings

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmwsl.models.teachers import fast as fast_teacher
from mmwsl.models.teachers.fast import fast_forward
from tests.tiny import ROOT, batch, build, distillation, losses, on_device, run_digits, save_teacher

INSIDE = dict(
    type='mmwsl.WSLDistiller',
    teacher_recorders=dict(features=dict(type='ModuleOutputs', source='backbone.layer1.0.bn2')),
)


def norms(network):
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def with_running_statistics(network):
    """Give each BatchNorm statistics and weights that show where they are used."""
    generator = torch.Generator().manual_seed(0)
    for module in norms(network):
        for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
            tensor.uniform_(0.5, 1.5, generator=generator)
    return network


def settled(network, inputs):
    """As :func:`with_running_statistics`, but with statistics that keep activations in bounds in a deep network."""
    with_running_statistics(network)
    network.train()
    for module in norms(network):
        module.momentum = None
    with torch.no_grad():
        network(inputs)
    network.eval()
    return network


@pytest.fixture
def model():
    """A distillation whose teacher's running statistics matter."""

    def make(**kwargs):
        model = build(distillation(**kwargs))
        with_running_statistics(model.teacher)
        return model

    return make


def prepared(model, size=6):
    return model.data_preprocessor(batch(size), True)['inputs']


def recorded(model):
    return model.distiller.teacher_recorders.get_recorder('logits').get_record_data()


def assert_same(logits, expected, tolerance=1e-4):
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
@pytest.mark.parametrize('speed, tolerance', [('fold', 1e-4), ('bf16', 0.1)])
@pytest.mark.parametrize('norm_eval', [True, False])
def test_student_is_taught_by_a_fast_copy(model, speed, tolerance, norm_eval):
    model = model(teacher_speed=speed, teacher_norm_eval=norm_eval)
    count = len(norms(model.teacher))
    with torch.no_grad():
        expected = model.teacher(prepared(model))
    losses(model, batch())
    assert_same(recorded(model), expected, tolerance)
    model.frozen_teacher._whole_pass = None  # the network itself is not asked again
    losses(model, batch())
    assert_same(recorded(model), expected, tolerance)
    assert len(norms(model.teacher)) == count  # the teacher itself stays as it is


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
@pytest.mark.parametrize('norm_eval', [True, False])
def test_batchnorm_is_folded_where_its_statistics_run(model, monkeypatch, norm_eval):
    networks = []
    runner = fast_teacher._runner
    monkeypatch.setattr(
        fast_teacher, '_runner', lambda network, half: networks.append(network) or runner(network, half)
    )
    model = model(teacher_norm_eval=norm_eval)
    losses(model, batch())
    (network,) = networks
    assert bool(norms(network)) is not norm_eval
    convolution = network.backbone.layer1[0].conv1
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
@pytest.mark.parametrize('speed', ['plain', 'fold', 'bf16', 'compile_bf16'])
def test_what_reads_inside_leaves_the_teacher_as_it_is(model, speed):
    plain, other = model(teacher_speed='plain'), model(teacher_speed=speed, distiller=INSIDE)
    other.load_state_dict(plain.state_dict())
    other.teacher.load_state_dict(plain.teacher.state_dict())
    for each in (plain, other):
        losses(each, batch())
        assert each.frozen_teacher._copy is None
    torch.testing.assert_close(recorded(other), recorded(plain), rtol=0, atol=0)


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
def test_a_head_that_has_not_the_last_word_leaves_the_teacher_as_it_is(model):
    model = model()
    model.teacher.register_forward_hook(lambda module, args, logits: logits + 1)
    losses(model, batch())
    assert model.frozen_teacher._copy is None


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
def test_batch_statistics_are_not_taken_from_a_teacher_in_eval_mode(model):
    model = model(teacher_norm_eval=False)
    model.eval()
    losses(model, batch())
    assert model.frozen_teacher._copy is None
    model.train()
    with torch.no_grad():
        expected = model.teacher(prepared(model))
    losses(model, batch())
    assert model.frozen_teacher._copy is not None
    assert_same(recorded(model), expected)
    model.eval()
    with torch.no_grad():
        in_eval_mode = model.teacher(prepared(model))
    losses(model, batch())
    assert_same(recorded(model), in_eval_mode)
    assert (in_eval_mode - expected).abs().max() > 1e-2


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
@pytest.mark.parametrize(
    'copied',
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), nn.Module.double],
    ids=['deepcopy', 'pickle', 'another type'],
)
def test_copies_and_conversions_make_a_fast_teacher_of_their_own(model, copied):
    model = model()
    losses(model, batch())
    other = copied(model)
    assert other is model or other.frozen_teacher._copy is None
    with_running_statistics(other.teacher)
    other.teacher.head.fc.bias.data += 1
    data = other.data_preprocessor(batch(), True)
    data['inputs'] = data['inputs'].to(next(other.parameters()).dtype)
    other(**data, mode='loss')
    expected = other.teacher(data['inputs'])
    torch.testing.assert_close(recorded(other), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_unknown_speed():
    with pytest.raises(ValueError, match="one of .*'fold'.*got 'fast'"):
        build(distillation(teacher_speed='fast'))


TEACHERS = sorted(path.stem for path in (ROOT / 'configs').glob('wsl_*.py'))


@pytest.mark.parametrize('name', TEACHERS)
def test_every_teacher_of_the_catalogue_says_the_same(name):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.model.teacher.pop('ckpts', None)
    if 'swin' in name:
        cfg.model.teacher.backbone.update(pad_small_map=True)
    torch.manual_seed(0)
    teacher = MODELS.build(cfg.model.teacher)
    channels, side = (1, 8) if 'digits' in name else (3, 64 if 'in1k' in name else 32)
    inputs = torch.randn(4, channels, side, side)
    settled(teacher, inputs).requires_grad_(False)
    expected = teacher(inputs)
    assert expected.std() > 1e-3  # logits that a wrong fold would change
    fast = fast_forward(teacher, inputs, 'fold')
    assert fast is not None
    assert_same(fast(inputs), expected)
    others = torch.randn(2, channels, side, side)
    assert_same(fast(others), teacher(others))


def test_a_wrong_fold_is_left_out(monkeypatch):
    def break_it(teacher):
        teacher.head.fc.bias.data += 1
        return teacher

    monkeypatch.setattr(fast_teacher, 'fuse_conv_bn', break_it)
    teacher = with_running_statistics(build(distillation(teacher_ckpt=None)['teacher']).eval())
    inputs = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        assert_same(fast_forward(teacher, inputs, 'fold')(inputs), teacher(inputs))


@pytest.mark.parametrize('enabled', [True, False])
def test_a_fold_that_rounds_otherwise_under_autocast_is_left_out_there(monkeypatch, enabled):
    def fold(teacher):
        teacher.head.register_forward_hook(
            lambda module, args, logits: logits * (1.5 if torch.is_autocast_enabled('cpu') else 1)
        )
        return fuse_conv_bn(teacher)

    folded = []
    monkeypatch.setattr(fast_teacher, 'fuse_conv_bn', fold)
    monkeypatch.setattr(fast_teacher, '_runner', lambda network, half: folded.append(not norms(network)))
    teacher, inputs = with_running_statistics(build(distillation()['teacher']).eval()), torch.randn(4, 1, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled):
        fast_forward(teacher, inputs, 'fold')
    assert folded == [not enabled]


def test_what_is_chosen_is_said_with_its_time_and_its_memory(monkeypatch):
    said, times = [], iter([8.0, 2.0])
    monkeypatch.setattr(fast_teacher, 'print_log', lambda message, logger: said.append(message))
    monkeypatch.setattr(fast_teacher, '_milliseconds', lambda network, batch: next(times))
    teacher = build(distillation()['teacher']).eval()
    monkeypatch.setattr(teacher.head, 'loss_module', nn.Linear(1024, 1024, bias=False))  # 4 MB
    fast_forward(teacher, torch.randn(4, 1, 8, 8), 'fold')
    assert said == [
        'The teacher runs with its BatchNorm folded into convolutions, channels last: 2 ms a batch, '
        'instead of 8. The copy takes 4.02 MB more.'
    ]


@pytest.mark.parametrize(
    'backbone, channels',
    [
        (dict(type='mmwsl.CIFARShuffleNetV2'), 1024),  # its views know one layout only
        (dict(type='mmrazor.WideResNet', depth=10, widen_factor=1), 64),  # normalises before it convolves
        (dict(type='mmwsl.CIFARMobileNetV2'), 1280),
    ],
)
def test_networks_that_are_hard_to_fold(backbone, channels):
    torch.manual_seed(0)
    teacher = build(
        dict(
            type='ImageClassifier',
            _scope_='mmpretrain',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=channels),
        )
    )
    inputs = torch.randn(4, 3, 32, 32)
    settled(teacher, inputs).requires_grad_(False)
    fast = fast_forward(teacher, inputs, 'fold')
    assert fast is None or assert_same(fast(inputs), teacher(inputs)) is None


def test_bfloat16_that_ruins_the_logits_is_left_out(monkeypatch):
    monkeypatch.setattr(fast_teacher, '_BF16_TOLERANCE', 1e-9)
    teacher = with_running_statistics(build(distillation()['teacher']).eval())
    inputs = torch.randn(4, 1, 8, 8)
    with pytest.warns(UserWarning, match='runs in float32, because bfloat16 changes a logit'):
        fast = fast_forward(teacher, inputs, 'bf16')
    assert_same(fast(inputs).detach(), teacher(inputs).detach())


def test_compilation_that_fails_is_left_out_with_one_warning(model, monkeypatch):
    def no_compiler(run):
        def fail(*batch):
            raise RuntimeError('no C++ compiler')

        return fail

    monkeypatch.setattr(torch, 'compile', no_compiler)
    with pytest.warns(UserWarning) as caught:
        model = model(teacher_speed='compile')
        with torch.no_grad():
            expected = model.teacher(prepared(model))
        for _ in range(3):
            losses(model, batch())
    assert sum('no C++ compiler' in str(warning.message) for warning in caught) == 1
    assert_same(recorded(model), expected)


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
def test_compilation_that_changes_logits_is_left_out_with_one_warning(model, monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda run: lambda *batch: 1.01 * run(*batch))
    model = model(teacher_speed='compile')
    with torch.no_grad():
        expected = model.teacher(prepared(model))
    with pytest.warns(UserWarning, match='torch.compile, which changes a logit by more than 0.0001 of the largest'):
        losses(model, batch())
    assert_same(recorded(model), expected)


FINER = hasattr(torch.backends.cudnn, 'conv')  # torch's newer switches of TF32


def precisions():
    """What torch says of TF32; 'mixed' where its older switches cannot say."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = [matmul.fp32_precision, cudnn.conv.fp32_precision] if FINER else []
    for read in (torch.get_float32_matmul_precision, lambda: matmul.allow_tf32, lambda: cudnn.allow_tf32):
        try:
            found.append(read())
        except RuntimeError:
            found.append('mixed')
    return found


@pytest.fixture
def usual_precisions():
    before = precisions()
    yield
    torch.set_float32_matmul_precision('highest')
    if FINER:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before[:2]
    assert precisions() == before


def convolutions_round():
    cudnn = torch.backends.cudnn
    return cudnn.conv.fp32_precision == 'tf32' if FINER else cudnn.allow_tf32


@pytest.mark.parametrize(
    'setting',
    [
        'highest',
        'high',
        'medium',
        pytest.param('finer', marks=pytest.mark.skipif(not FINER, reason='this torch has the older switches alone')),
    ],
)
def test_rounding_to_tf32_does_not_hide_the_fold(usual_precisions, setting):
    """A stand-in for a GPU, whose convolutions round each form of a network otherwise while TF32 is allowed."""

    def round_otherwise(module, args):
        if convolutions_round():
            return (args[0] * (1 + 1e-2 * torch.rand_like(args[0])),)
        return None

    if setting == 'finer':
        torch.backends.cuda.matmul.fp32_precision = 'tf32'
    else:
        torch.set_float32_matmul_precision(setting)
    before = precisions()
    assert convolutions_round()
    teacher = with_running_statistics(build(distillation()['teacher']).eval())
    teacher.backbone.conv1.register_forward_pre_hook(round_otherwise)
    assert fast_forward(teacher, torch.randn(4, 1, 8, 8), 'fold') is not None
    assert precisions() == before


@pytest.mark.parametrize('enabled', [True, False])
def test_compilation_is_judged_by_the_precision_of_the_run(monkeypatch, enabled):
    monkeypatch.setattr(torch, 'compile', lambda run: lambda *batch: 1.01 * run(*batch))
    teacher, inputs = build(distillation()['teacher']).eval(), torch.randn(4, 1, 8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=enabled), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fast_forward(teacher, inputs, 'compile')
    assert any('runs without torch.compile' in str(warning.message) for warning in caught) is not enabled


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
def test_mmengines_compile_works_on_a_compiled_teacher(tmp_path):
    model = distillation(teacher_speed='compile')
    runner = run_digits(tmp_path, model, custom_hooks=[], compile=dict(backend='eager'))
    assert runner.iter == 6
    assert runner.model.frozen_teacher._copy is not None


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
@pytest.mark.parametrize(
    'speed, norm_eval, tolerance', [('compile', True, 1e-4), ('compile', False, 1e-4), ('compile_bf16', True, 0.1)]
)
def test_compiled_teacher_says_the_same_of_batches_of_any_size(model, speed, norm_eval, tolerance):
    model = model(teacher_speed=speed, teacher_norm_eval=norm_eval)
    torch._dynamo.utils.counters.clear()  # what other tests compiled
    frames = torch._dynamo.utils.counters['stats']
    for count, size in enumerate((6, 6, 3, 6, 4)):
        with torch.no_grad():
            expected = model.teacher(prepared(model, size))
        losses(model, batch(size))
        assert_same(recorded(model), expected, tolerance)
        if count == 0:
            compiled = frames['unique_graphs']
            assert compiled > 0
    assert frames['unique_graphs'] == compiled
    copy.deepcopy(model), pickle.dumps(model)


def course(work_dir, path, speed, loader):
    """Each step's loss of a run on the digits."""
    torch.manual_seed(0)
    model = distillation(teacher_ckpt=path, teacher_speed=speed)
    cfg = {**loader, 'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None}
    runner = run_digits(work_dir, model, epochs=9, custom_hooks=[dict(type='mmwsl.EpochSeedHook')], **cfg)
    return torch.tensor(runner.message_hub.get_scalar('train/loss').data[0])


@pytest.mark.parametrize(
    'speed, tolerance',
    [
        ('fold', 1e-3),
        ('bf16', 2e-2),
        pytest.param('compile', 1e-3, marks=pytest.mark.slow),
        pytest.param('compile_bf16', 2e-2, marks=pytest.mark.slow),
    ],
)
def test_every_speed_up_leaves_the_course_of_training_as_it_was(tmp_path, speed, tolerance):
    """The teacher's and the device's, together, over 54 steps: each loss to 0.1 %, in bfloat16 to 2 %."""
    path = save_teacher(tmp_path / 'teacher.pth')
    fast = course(tmp_path / 'fast', path, speed, on_device())
    plain = course(tmp_path / 'plain', path, 'plain', {})
    assert len(plain) == 54
    assert not torch.equal(fast, plain)  # or it was not fast
    torch.testing.assert_close(fast, plain, rtol=tolerance, atol=0)
