import sys

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope

from mmwsl.engine import config_checks
from mmwsl.engine.config_checks import (
    check_option_keys,
    check_static_graph,
    explained_config,
    warn_of_schedule,
    warn_of_unread_keys,
)
from tests.tiny import ROOT, distillation, load_tool, network

INSTALL = "there is no model '(mmdet.)?GFL': mmdet is not installed. It comes with the extra dense: .*DENSE=1"


@pytest.fixture
def told(monkeypatch):
    texts = []
    monkeypatch.setattr(config_checks, 'print_log', lambda text, logger, level: texts.append(text))
    return texts


@pytest.fixture(scope='module')
def digits():
    return Config.fromfile(ROOT / 'configs/wsl_digits.py')


def distilling(**loss):
    return distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=loss)))


@pytest.mark.parametrize(
    'cfg, scope',
    [
        (dict(type='mmdet.GFL'), 'mmengine'),
        (dict(type='GFL', _scope_='mmdet'), 'mmengine'),
        (dict(type='GFL'), 'mmdet'),
    ],
)
def test_package_that_is_not_installed_is_named(cfg, scope, monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmdet', None)
    monkeypatch.setattr(config_checks.importlib.util, 'find_spec', lambda name: None if name == 'mmdet' else True)
    with DefaultScope.overwrite_default_scope(scope), pytest.raises(ValueError, match=INSTALL), explained_config():
        MODELS.build(cfg)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (distilling(type='mmwsl.WSLLoss', tao=3), "WSLLoss has no argument 'tao'. Did you mean 'tau'\\? It takes tau"),
        (distillation(teachr_ckpt='x'), "WSLDistill has no argument 'teachr_ckpt'. Did you mean 'teacher_ckpt'\\?"),
        ({**network(2), 'backbone': dict(type='mmwsl.CIFARResnet')}, "'mmwsl.CIFARResnet'. Did you mean 'mmwsl.CI"),
        (distilling(type='mmwls.WSLLoss'), "there is no model 'mmwls.WSLLoss'. Did you mean 'mmwsl.WSLLoss'"),
        (
            distillation(
                distiller=dict(
                    type='mmrazor.ConfigurableDistiller',
                    student_recorders=dict(logits=dict(type='ModuleOutputs', source='head')),
                )
            ),
            "no task util 'ModuleOutputsRecorder'. Did you mean 'mmrazor.ModuleOutputsRecorder'\\?",
        ),
        (distilling(type='WSLLos'), "there is no model 'WSLLos'. Did you mean 'WSLLoss'\\?"),
        (
            dict(type='mmwsl.WeightedLoss', loss=dict(type='DKD', alfa=1)),
            "DKD has no argument 'alfa'. Did you mean 'al",
        ),
        (dict(type='mmwsl.WeightedLoss', loss=dict(type='Qqqqqqq')), "there is no model 'Qqqqqqq'. For a class of"),
    ],
    ids=[
        'argument',
        'argument of a base',
        'type',
        'scope',
        'type of another scope',
        'type without scope',
        'argument of a part',
        'nothing like it',
    ],
)
def test_misspelt_word_of_a_config_is_explained(cfg, message):
    init_default_scope('mmpretrain')
    with pytest.raises(ValueError, match=message), explained_config():
        MODELS.build(cfg)


@pytest.mark.parametrize(
    'error', [TypeError('other'), KeyError('other'), TypeError("f() got an unexpected keyword argument 'x'")]
)
def test_errors_that_are_not_of_a_config_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, explained_config():
        raise error
    assert raised.value is error


def test_argument_of_what_training_builds_is_explained(tmp_path):
    with pytest.raises(ValueError, match=r"SGD has no argument 'lrr'\. Did you mean 'lr'\?"):
        load_tool('train').main(
            [
                str(ROOT / 'configs/vanilla/digits_student.py'),
                '--work-dir',
                str(tmp_path),
                '--cfg-options',
                'optim_wrapper.optimizer.lrr=0.1',
            ]
        )


@pytest.mark.parametrize(
    'option, message',
    [
        ('trian_cfg.max_epochs', "nothing reads 'trian_cfg'. Did you mean 'train_cfg'"),
        ('train_cfg.max_epoch', "nothing reads 'max_epoch' of train_cfg. Did you mean 'max_epochs'"),
        ('seed', "nothing reads 'seed'"),
        (
            'param_scheduler.0.begin',
            'param_scheduler is a dict, not a list. Leave the number out: param_scheduler.begin$',
        ),
        ('custom_hooks.type', 'custom_hooks is a list of 2. .* such as custom_hooks.0.type$'),
        ('custom_hooks.2.type', 'custom_hooks has no entry 2. Count its 2 entries from 0$'),
        ('custom_hooks.1', 'custom_hooks.1 is a whole entry of a list. .* such as custom_hooks.1.type$'),
    ],
)
def test_option_that_cannot_be_set_is_refused(digits, option, message):
    with pytest.raises(ValueError, match=f'--cfg-options {option}: {message}'):
        check_option_keys(digits, {option: 2})


@pytest.mark.parametrize(
    'option',
    [
        'train_cfg.max_epochs',
        'tta_model.type',
        'model.teacher_ckpt',
        'randomness.seed',
        'custom_hooks.1.min_accuracy',
        'param_scheduler.begin',
        'work_dir',
    ],
)
def test_option_that_is_read_is_taken(digits, option, told):
    check_option_keys(digits, {option: 2})
    assert told == []


def test_option_for_what_a_config_has_used_already_is_named(digits, told):
    check_option_keys(digits, {'digits_student.head.num_classes': 2})
    assert told == [
        '--cfg-options digits_student.head.num_classes does not change what the config has '
        "already made from 'digits_student'."
    ]


def test_key_of_a_file_that_looks_misspelt_is_named(told):
    keys = ('modle', 'test_pipeline', 'train_dataloader', 'resnet20', 'train_cfg')
    warn_of_unread_keys(Config(dict.fromkeys(keys)))
    assert told == ["Nothing reads 'modle' in the config. Did you mean 'model'?"]


def test_no_config_of_the_project_looks_misspelt(told):
    for path in sorted((ROOT / 'configs').rglob('*.py')):
        # bases of mmdet and mmseg need these
        if not {'_base_', 'det', 'seg'} & set(path.relative_to(ROOT / 'configs').parts):
            cfg = Config.fromfile(path)
            warn_of_unread_keys(cfg)
            warn_of_schedule(cfg)
    assert told == []


@pytest.mark.parametrize(
    'scheduler, said',
    [
        (dict(type='CosineAnnealingLR', T_max=8), 'cosine ends after epoch 8: set T_max=2 to end it with training'),
        (dict(type='CosineAnnealingLR', T_max=8, begin=1), 'cosine ends after epoch 9: set T_max=1 to end'),
        (dict(type='MultiStepLR', milestones=[1, 2, 5]), 'the milestones [2, 5] are never reached'),
        (dict(type='LinearLR', end=5), 'end=5 is never reached'),
        (dict(type='CosineAnnealingLR', T_max=2), None),
        (dict(type='CosineAnnealingLR', T_max=1, begin=1), None),
        (dict(type='CosineAnnealingLR', T_max=300, by_epoch=False), None),
        (dict(type='MultiStepLR', milestones=[1]), None),
    ],
)
@pytest.mark.parametrize('several', [False, True])
def test_schedule_that_ends_at_another_epoch_is_named(told, scheduler, said, several):
    warn_of_schedule(Config(dict(train_cfg=dict(max_epochs=2), param_scheduler=[scheduler] if several else scheduler)))
    assert [said in text for text in told] == ([True] if said else [])


def test_a_static_graph_sends_gradients_in_each_step():
    cfg = Config(dict(model_wrapper_cfg=dict(static_graph=True), optim_wrapper=dict(accumulative_counts=4)))
    with pytest.raises(ValueError, match='optim_wrapper.accumulative_counts=4 sends them every 4 steps'):
        check_static_graph(cfg)
    for fine in (dict(model_wrapper_cfg=dict(static_graph=False)), dict(optim_wrapper=dict(accumulative_counts=1))):
        check_static_graph(Config({**cfg, **fine}))
    check_static_graph(Config(dict(optim_wrapper=dict(accumulative_counts=4))))
