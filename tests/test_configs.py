"""Every config: what it builds, and that it trains."""

import functools
import math

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch.nn import functional as F

from tests.tiny import ROOT, build

CONFIGS = ROOT / 'configs'
# detection and segmentation need packages of their own: tests/test_dense/test_configs.py
FILES = sorted(
    path for path in CONFIGS.rglob('*.py') if not {'_base_', 'det', 'seg'} & set(path.relative_to(CONFIGS).parts)
)
DISTILLED = sorted(
    path.stem
    for path in FILES
    if path.stem.startswith(('wsl_', 'kd_'))
    and 'digits' not in path.stem
    and not path.stem.endswith(('_cached', '_device'))
)
# by their usual recipe; what else a name ends in is a variant of one
PAIRS = [name for name in DISTILLED if name.endswith(('_in1k', '_cifar100', '_cifar10'))]

# other methods than weighted and plain soft labels, and those of them with WSL's weights
METHODS = ('kd-hinton', 'kd-ls', 'dkd', 'nkd', 'dist', 'wttm')
OTHERS = sorted(path.stem for path in FILES if path.stem.startswith(tuple(f'{method}_' for method in METHODS)))
WEIGHTED = sorted(
    path.stem for path in FILES if path.stem.startswith(('wsl-hinton_', 'wsl-dkd_', 'wsl-nkd_', 'wsl-dist_'))
)

# parameters with 100 classes, and what the backbone makes of a 32x32 image
CIFAR_NETWORKS = {
    'r20': (278_324, (64, 8, 8)),
    'r32': (472_756, (64, 8, 8)),
    'r44': (667_188, (64, 8, 8)),
    'r56': (861_620, (64, 8, 8)),
    'r110': (1_736_564, (64, 8, 8)),
    'r8x4': (1_233_540, (256, 8, 8)),
    'r32x4': (7_433_860, (256, 8, 8)),
    'r50': (23_705_252, (2048, 4, 4)),
    'wrn16-2': (703_284, (128, 8, 8)),
    'wrn40-1': (569_780, (64, 8, 8)),
    'wrn40-2': (2_255_156, (128, 8, 8)),
    'vgg8': (3_965_028, (512, 4, 4)),
    'vgg13': (9_462_180, (512, 4, 4)),
    'mbv2': (812_836, (1280, 2, 2)),
    'sv1': (949_258, (960, 4, 4)),
    'sv2': (1_355_528, (1024, 4, 4)),
}


def load(name):
    cfg = Config.fromfile(next(path for path in FILES if path.stem == name))
    init_default_scope(cfg.default_scope)
    return cfg


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_loaders_without_workers_say_so_to_other_tools(path):
    cfg = Config.fromfile(path)  # where persistent_workers is missing, mmpretrain's tools set True
    loaders = [cfg[f'{part}_dataloader'] for part in ('train', 'val', 'test')]
    assert all(loader.get('persistent_workers', True) == (loader.num_workers > 0) for loader in loaders)


@pytest.mark.parametrize('name', CIFAR_NETWORKS)
def test_network_is_the_one_that_the_field_means(name):
    model = MODELS.build(load(f'{name}_cifar100').model)
    parameters, features = CIFAR_NETWORKS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    model.eval()
    assert [tuple(feature.shape[1:]) for feature in model.backbone(torch.zeros(1, 3, 32, 32))] == [features]


def image_batch(cfg, size):
    """Images and labels of the kind that the config's data are, as a dataloader hands them over."""
    side = 32 if 'cifar' in cfg.filename else 224
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, cfg.data_preprocessor.num_classes, (size,), generator=generator)
    return dict(inputs=images, data_samples=[DataSample().set_gt_label(label) for label in labels])


def steps(names):
    """The quick ones always, ImageNet's only with the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name.endswith('in1k') else ()) for name in names]


@pytest.mark.filterwarnings('ignore:teacher_ckpt is None')
# with BatchNorm in eval mode the teacher is folded, and its weights are others
@pytest.mark.parametrize('name', steps([name for name in DISTILLED if not name.endswith('_eval')]))
def test_pair_takes_a_step(name):
    cfg = load(name)
    cfg.model.teacher_ckpt = None
    cfg.model.teacher.pop('ckpts', None)
    model = build({'data_preprocessor': cfg.data_preprocessor, **cfg.model})
    model.train()
    teacher, student = weights_of(model.teacher), weights_of(model.student)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: reached.append(name))
    logged = model.train_step(image_batch(cfg, 4), build_optim_wrapper(model, cfg.optim_wrapper))
    assert 0 < float(logged['student.loss']) < float(logged['loss']) < float('inf')
    assert sorted(reached) == sorted(learning)
    torch.testing.assert_close(weights_of(model.teacher), teacher, rtol=0, atol=0)
    after = weights_of(model.student)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after['head.fc.weight'], student['head.fc.weight'])
    assert model.student.head.num_classes == cfg.data_preprocessor.num_classes


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize('name', [name for name in DISTILLED if name.startswith('kd_')])
def test_control_differs_in_the_distiller_alone(name):
    control, pair = (load(name.replace('kd_', prefix, 1)).to_dict() for prefix in ('kd_', 'wsl_'))
    losses = [cfg['model'].pop('distiller')['distill_losses'] for cfg in (control, pair)]
    for cfg in (control, pair):
        cfg.pop('kd', None), cfg.pop('wsl', None)
    assert control == pair
    (kd,), (wsl,) = (loss.values() for loss in losses)
    assert (kd['type'], wsl['type']) == ('mmrazor.KLDivergence', 'mmwsl.WSLLoss')
    assert (kd['tau'], kd['loss_weight']) == (wsl['tau'], wsl['loss_weight'])


@pytest.mark.parametrize('name', ['wsl_r56_r20_cifar100', 'wsl_r56_r20_cifar100_8e_eval'])
def test_cached_pair_differs_in_two_lines(name):
    live, cached = (load(name + suffix).to_dict() for suffix in ('', '_cached'))
    assert cached['model']['teacher_cache'] == f'work_dirs/{name}/teacher_cache', 'where tools/cache_teacher.py puts it'
    assert cached['model'].pop('teacher_cache') == cached['train_dataloader']['dataset'].pop('cache')
    assert cached['train_dataloader']['dataset'].pop('type') == 'mmwsl.CachedViews'
    assert live['train_dataloader']['dataset'].pop('type') == 'mmwsl.SeededViews'
    assert cached == live


def test_device_pair_differs_in_its_data_alone():
    usual, device = (load(f'wsl_r56_r20_cifar100{suffix}').to_dict() for suffix in ('', '_device'))
    loaders = [{name: cfg.pop(f'{name}_dataloader') for name in ('train', 'val', 'test')} for cfg in (usual, device)]
    assert device == usual
    for usual_loader, device_loader in zip(*(loader.values() for loader in loaders), strict=True):
        assert device_loader['batch_size'] == usual_loader['batch_size']
        assert device_loader['sampler'] == usual_loader['sampler']
        assert device_loader['dataset']['type'] == 'mmwsl.DeviceDataset'


def test_names_are_unique_and_every_pair_has_its_control_and_its_networks_alone():
    stems = [path.stem for path in FILES]
    assert len(stems) == len(set(stems))
    for name in (name for name in PAIRS if name.startswith('wsl_')):
        assert name.replace('wsl_', 'kd_', 1) in stems
        teachers, student, dataset = name.removeprefix('wsl_').rsplit('_', 2)
        networks = [student, *teachers.replace('-r', ' r').split()]
        assert {f'{network}_{dataset}' for network in networks} <= set(stems)


@pytest.mark.parametrize('name', PAIRS)
def test_learning_rate_is_the_recipes(name):
    small = ('mbv2_cifar100', 'sv1_cifar100', 'sv2_cifar100')
    expected = 0.01 if name.endswith(small) else 0.05 if 'cifar' in name else 0.1
    assert load(name).optim_wrapper.optimizer.lr == expected


@pytest.mark.parametrize(
    'name', [name for name in (*DISTILLED, *OTHERS, *WEIGHTED) if 'r56' in name and name.endswith(('_8e', '_8e_eval'))]
)
def test_short_schedule_changes_nothing_but_the_recipe(name):
    """Schedule, batch size, the warm-up of DKD and, where the name says so, the teacher's BatchNorm."""
    short, usual = load(name).to_dict(), load(name.partition('_8e')[0]).to_dict()
    if 'dkd' in name:
        assert [
            cfg['model']['distiller']['distill_losses']['loss_dkd'].pop('warmup_epochs') for cfg in (short, usual)
        ] == [0, 20]
        short.pop('dkd'), usual.pop('dkd')
    for cfg in (short, usual):
        for field in ('optim_wrapper', 'param_scheduler', 'train_cfg', 'auto_scale_lr', 'wsl', 'kd'):
            cfg.pop(field, None)
    assert short.pop('custom_hooks') == [*usual.pop('custom_hooks'), dict(type='mmwsl.ChannelsLastHook')]
    assert short['train_dataloader'].pop('batch_size') == 2 * usual['train_dataloader'].pop('batch_size')
    norm_eval = short['model'].pop('teacher_norm_eval'), usual['model'].pop('teacher_norm_eval')
    assert norm_eval == (name.endswith('_eval'), False)
    assert short == usual


@pytest.mark.parametrize('name', sorted(path.stem for path in FILES if path.stem.endswith('_noise')))
def test_noise_is_all_that_differs(name):
    noisy, clean = load(name).to_dict(), load(name.removesuffix('_noise')).to_dict()
    dataset = noisy['train_dataloader']['dataset']['dataset']
    noise = dataset.get('dataset', dataset)['pipeline'].pop(0)  # inside a Fold
    for cfg in (noisy, clean) if name.startswith('wsl-oof') else ():  # L_t of the labels in question
        assert cfg['model']['distiller']['distill_losses']['loss_wsl']['weighting'].pop('teacher_losses')
    classes = noisy['data_preprocessor']['num_classes']
    assert noise == dict(type='mmwsl.LabelNoise', prob=0.2, num_classes=classes)
    assert noisy == clean


@pytest.mark.parametrize(
    'name, usual, student',
    [
        ('wsl_r20_r20_cifar100_8e', 'wsl_r56_r20_cifar100_8e', 'resnet20'),
        ('wsl_digits_student_student', 'wsl_digits', 'digits_student'),
    ],
)
def test_student_that_is_its_own_teacher(name, usual, student):
    itself, usual = load(name).to_dict(), load(usual).to_dict()
    assert itself['model'].pop('teacher') == itself['model']['architecture'] == itself[student]
    assert itself['model'].pop('teacher_ckpt') != usual['model'].pop('teacher_ckpt')
    usual['model'].pop('teacher')
    assert itself == usual


def test_short_schedule_warms_up_and_ends_at_zero():
    cfg = load('r20_cifar100_8e')
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = [build_scheduler(optimizer, dict(scheduler), epoch_length=391) for scheduler in cfg.param_scheduler]
    rates = []
    for _ in range(8 * 391):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    warm = [min(1, 0.005 + 0.995 * step / 199) for step in range(8 * 391)]
    expected = [0.1 * factor * (1 + math.cos(math.pi * step / (8 * 391))) / 2 for step, factor in enumerate(warm)]
    torch.testing.assert_close(rates, expected, rtol=1e-3, atol=1e-9)


def build_scheduler(optimizer, cfg, epoch_length):
    cls = PARAM_SCHEDULERS.get(cfg.pop('type'))
    if cfg.pop('convert_to_iter_based', False):
        return cls.build_iter_from_epoch(optimizer, epoch_length=epoch_length, **cfg)
    return cls(optimizer, **cfg)


def distill_loss(cfg):
    (loss,) = cfg['model']['distiller']['distill_losses'].values()
    return loss


@pytest.mark.parametrize('name', OTHERS)
def test_method_is_all_in_which_it_differs_from_weighted_soft_labels(name):
    method, _, pair = name.partition('_')
    other, wsl = load(name).to_dict(), load(f'wsl_{pair}').to_dict()
    other.pop(method.replace('-', '_'))
    usual = f'{method}_{"r34_r18_in1k" if pair.endswith("in1k") else "r56_r20_cifar100"}'
    assert other['model'].pop('student_loss_weight', 1) == OBJECTIVES[usual][0]
    losses = [distill_loss(cfg) for cfg in (other, load(usual).to_dict())]
    for loss in losses:
        loss.pop('warmup_epochs', None)  # by schedule
    assert losses[0] == losses[1]
    for cfg in (other, wsl):
        cfg['model'].pop('distiller')
    assert other == wsl


@pytest.mark.parametrize('name', WEIGHTED)
def test_weights_are_all_in_which_a_method_with_them_differs(name):
    weighted, plain = (
        load(stem).to_dict() for stem in (name, name.replace('wsl-hinton', 'kd-hinton').replace('wsl-', ''))
    )
    assert distill_loss(weighted).pop('weighting') == dict(type='WSLWeighting')
    assert weighted == plain


def kl(student, teacher, tau):
    return tau**2 * F.kl_div((student / tau).log_softmax(1), (teacher / tau).softmax(1), reduction='batchmean')


def standardised(logits):
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)


def others(logits, target):
    return logits[F.one_hot(target, logits.shape[1]) == 0].reshape(len(logits), -1)


def dkd(student, teacher, target, tau, beta):
    true_S, true_T = ((logits / tau).softmax(1).gather(1, target[:, None]) for logits in (student, teacher))
    binary = F.kl_div(
        torch.cat((true_S, 1 - true_S), 1).log(), torch.cat((true_T, 1 - true_T), 1), reduction='batchmean'
    )
    return tau**2 * binary + beta * kl(others(student, target), others(teacher, target), tau)


def nkd(student, teacher, target, tau, gamma):
    of_true = teacher.softmax(1).gather(1, target[:, None])[:, 0] * F.cross_entropy(student, target, reduction='none')
    return of_true.mean() + gamma * kl(others(student, target), others(teacher, target), tau)


def dist(student, teacher, tau):
    probs_S, probs_T = (student / tau).softmax(1), (teacher / tau).softmax(1)
    return tau**2 * sum(
        1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)).mean()
        for a, b in ((probs_S, probs_T), (probs_S.T, probs_T.T))
    )


def wttm(student, teacher, gamma):
    powers = teacher.softmax(1) ** gamma
    total = powers.sum(1, keepdim=True)
    return (total * F.kl_div(student.log_softmax(1), powers / total, reduction='none')).sum(1).mean()


# what the authors' code minimises beside the cross-entropy, whose weight comes first; with their numbers
OBJECTIVES = {
    'kd-hinton_r56_r20_cifar100': (0.1, lambda s, t, y: 0.9 * kl(s, t, 4)),
    'kd-hinton_r34_r18_in1k': (0.5, lambda s, t, y: 0.5 * kl(s, t, 1)),
    'kd-ls_r56_r20_cifar100': (0.1, lambda s, t, y: 9 * kl(standardised(s), standardised(t), 2)),
    'kd-ls_r34_r18_in1k': (1, lambda s, t, y: 9 * kl(standardised(s), standardised(t), 2)),
    'dkd_r56_r20_cifar100': (1, lambda s, t, y: dkd(s, t, y, 4, beta=2)),
    'dkd_r34_r18_in1k': (1, lambda s, t, y: dkd(s, t, y, 1, beta=0.5)),
    'nkd_r56_r20_cifar100': (1, lambda s, t, y: nkd(s, t, y, 3, gamma=3.5)),
    'nkd_r34_r18_in1k': (1, lambda s, t, y: nkd(s, t, y, 1, gamma=1.5)),
    'dist_r56_r20_cifar100': (1, lambda s, t, y: 2 * dist(s, t, 4)),
    'dist_r34_r18_in1k': (1, lambda s, t, y: 2 * dist(s, t, 1)),
    'wttm_r56_r20_cifar100': (1, lambda s, t, y: 1.5 * wttm(s, t, 0.3)),
    'wttm_r34_r18_in1k': (1, lambda s, t, y: 1.6 * wttm(s, t, 0.8)),
}


@pytest.fixture
def in_epoch():
    """Tells losses the epoch, as a run does."""
    hub = MessageHub.get_current_instance()
    yield lambda epoch: hub.update_info('epoch', epoch)
    hub.pop_info('epoch', None)


def gradient(objective, student, *args):
    student = student.clone().requires_grad_()
    objective(student, *args).backward()
    return student.grad


@pytest.mark.parametrize('name', OBJECTIVES)
def test_method_minimises_what_its_authors_do(name, in_epoch):
    in_epoch(19)  # the first after DKD's warm-up
    cfg = load(name)
    weight, objective = OBJECTIVES[name]
    student, teacher, target = 3 * torch.randn(8, 10), 3 * torch.randn(8, 10), torch.randint(10, (8,))
    found = gradient(MODELS.build(distill_loss(cfg)), student, teacher, target)
    torch.testing.assert_close(found, gradient(objective, student, teacher, target), rtol=1e-4, atol=1e-6)
    assert cfg.model.get('student_loss_weight', 1) == weight


def test_dkd_warms_up_in_twenty_epochs(in_epoch):
    loss = MODELS.build(distill_loss(load('dkd_r56_r20_cifar100')))
    args = torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))
    values = []
    for epoch in (0, 9, 19, 239):
        in_epoch(epoch)
        values.append(loss(*args))
    torch.testing.assert_close(values, [values[-1] * share for share in (0.05, 0.5, 1, 1)])


@functools.cache
def shared_networks(images):
    """ResNet-56 and ResNet-20, built once for each kind of images: teacher and student of all methods."""
    return tuple(MODELS.build(load(f'{name}_cifar100').model) for name in ('r56', 'r20'))


def with_shared_networks(cfg):
    teacher, student = shared_networks(str(cfg.data_preprocessor))
    return build(
        {
            'data_preprocessor': cfg.data_preprocessor,
            **cfg.model,
            'architecture': student,
            'teacher': teacher,
            'teacher_ckpt': None,
        }
    )


@pytest.mark.parametrize('name', [*OTHERS, *WEIGHTED])
def test_method_builds(name):
    cfg = load(name)
    model = with_shared_networks(cfg)
    assert model.distiller.distill_losses.keys() == cfg.model.distiller.distill_losses.keys()
    assert model.student_loss_weight == cfg.model.get('student_loss_weight', 1)


@pytest.mark.parametrize('name', [name for name in (*OTHERS, *WEIGHTED) if name.endswith('cifar100_8e')])
def test_method_takes_two_steps(name):
    cfg = load(name)
    model = with_shared_networks(cfg)
    model.train()
    before, optim_wrapper = weights_of(model.student), build_optim_wrapper(model, cfg.optim_wrapper)
    for _ in range(2):
        logged = model.train_step(image_batch(cfg, 4), optim_wrapper)
        assert math.isfinite(logged['loss'])
        assert f'distill.{next(iter(cfg.model.distiller.distill_losses))}' in logged
    after = weights_of(model.student)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert not torch.equal(after['head.fc.weight'], before['head.fc.weight'])


# ---- several labels


def several_labels(name, **settings):
    cfg = load(f'{name}_digits-multi')
    cfg.merge_from_dict(
        dict(
            train_cfg=dict(max_epochs=1),
            train_dataloader=dict(dataset=dict(dataset=dict(scenes=20))),
            val_dataloader=dict(dataset=dict(scenes=20)),
            default_hooks=dict(logger=dict(interval=1)),
            **settings,
        )
    )
    return cfg


@pytest.fixture(scope='module')
def multi_teacher(tmp_path_factory):
    """File of an untrained teacher."""
    model = build(load('teacher_digits-multi').model)
    path = tmp_path_factory.mktemp('multi') / 'teacher.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


@pytest.mark.parametrize('name', ['kd', 'wsl'])
def test_several_labels_are_distilled(tmp_path, multi_teacher, name):
    """And the teacher is scored by mAP on the images of the validation."""
    cfg = several_labels(name, work_dir=str(tmp_path), experiment_name=str(tmp_path).replace('/', '_'))
    cfg.model.teacher_ckpt = multi_teacher
    runner = Runner.from_cfg(cfg)
    runner.train()
    said = next(tmp_path.glob('*/*.log')).read_text()
    assert 'Teacher: multi-label/mAP ' in said and ' on 20 validation images.' in said
    assert runner.message_hub.get_scalar(f'train/distill.loss_{name}').current() > 0
    weight = runner.message_hub.get_scalar('train/distill.wsl_weight').current()
    assert weight == 1 if name == 'kd' else 0 < weight < 1


def test_a_teacher_of_several_labels_may_have_a_least_score(tmp_path, multi_teacher):
    hooks = [dict(type='mmwsl.CheckTeacherHook', min_score=90)]
    cfg = several_labels('wsl', work_dir=str(tmp_path), custom_hooks=hooks)
    cfg.model.teacher_ckpt = multi_teacher
    with pytest.raises(RuntimeError, match=r'has a multi-label/mAP of .* on 20 validation images; 90 is required'):
        Runner.from_cfg(cfg).train()


def test_pairs_of_several_labels_differ_in_the_weighting_alone():
    control, pair = (load(f'{name}_digits-multi').to_dict() for name in ('kd', 'wsl'))
    (kd,), (wsl,) = (cfg['model'].pop('distiller')['distill_losses'].values() for cfg in (control, pair))
    assert control == pair
    assert wsl == {**kd, 'weighting': dict(type='WSLWeighting')}
