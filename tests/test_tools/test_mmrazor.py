"""MMRazor's own configs, with its own algorithms: tools/try_mmrazor.py and tools/add_wsl.py."""

import functools
import re
import sys
from pathlib import Path

import cv2
import mmengine.config.utils
import mmrazor
import pytest
import torch
import yapf.yapflib.yapf_api
from mmengine import load
from mmengine.config import Config
from mmengine.hub import get_model

from mmwsl.utils import student_weights
from tests.tiny import ROOT, load_tool

KD = 'kd/kd_logits_resnet34_resnet18_8xb32_in1k.py'
UNTRAINED = 'factor_transfer/factor-transfer_backbone_resnet50_resnet18_8xb16_cifar10_pretrain.py'


@pytest.fixture(scope='module')
def tools():
    """tools/ is where they find each other."""
    sys.path.insert(0, str(ROOT / 'tools'))
    yield functools.cache(load_tool)
    sys.path.remove(str(ROOT / 'tools'))


@pytest.fixture(scope='module', autouse=True)
def _quick():
    """Configs are not formatted, and mmpretrain's list of them is read once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf.yapflib.yapf_api, 'FormatCode', lambda text, **_: (text, True))
        patch.setattr(mmengine.config.utils, 'load', functools.cache(mmengine.config.utils.load))
        yield


@pytest.fixture
def tried(tools, tmp_path, monkeypatch):
    """tools/try_mmrazor.py with ``tmp_path`` as its working directory."""
    monkeypatch.chdir(tmp_path)
    hub = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    tool = tools('try_mmrazor')
    yield tool
    tool.random_weights.cache_clear()
    torch.hub.set_dir(hub)


# ------------------------------------------------------------------------------------------------------ the configs


@pytest.mark.slow
def test_each_config_does_what_the_page_says(tried):
    text = (ROOT / 'docs/mmrazor.md').read_text()
    rows = [tried.try_config(path) for path in tried.configs()]
    assert tried.page(text, rows) == text, 'out of step: run tools/try_mmrazor.py --write'
    assert len(rows) == 19
    wanted = dict.fromkeys(('loads', 'trains', 'resumes', 'takes WSL'), True)
    assert [row.found for row in rows if row.config.match(UNTRAINED)] == [{**wanted, 'takes WSL': False}]
    assert all(row.found == wanted for row in rows if not row.config.match(UNTRAINED))


def test_the_page_has_each_config():
    text = (ROOT / 'docs/mmrazor.md').read_text()
    folder = Path(mmrazor.__file__).parent / '.mim/configs/distill/mmcls'
    listed = re.findall(r'^\| `(\w+/[\w.-]+\.py)` \| yes \| yes \| yes \| (?:yes|no) \|', text, re.M)
    assert listed == [str(path.relative_to(folder)) for path in sorted(folder.glob('*/*.py'))]


def test_a_config_that_fails_says_why(tried, tmp_path):
    (tmp_path / 'given').mkdir()
    (tmp_path / 'given/broken.py').write_text(
        "_base_ = 'mmcls::resnet/resnet18_8xb16_cifar10.py'\nmodel = dict(head=dict(type='NoHead'))\n"
    )
    row = tried.try_config(tmp_path / 'given/broken.py')
    assert row.found == {'loads': True, 'trains': False}
    assert re.search("there is no model 'NoHead'", row.cells[-1]) and row.cells[1:5] == ('yes', 'no', '', '')


# -------------------------------------------------------------------------------------------------- a checkpoint


def test_a_checkpoint_of_mmrazor_is_tested_and_its_student_exported(tried, tools, tmp_path, monkeypatch):
    path = next(path for path in tried.configs() if path.match(KD))
    tried.write_small(path, tmp_path)
    tried.train_small(path, tmp_path, steps=2)
    checkpoint = str(tmp_path / 'run/epoch_1.pth')
    stored = torch.load(checkpoint, weights_only=False)['state_dict']
    assert {key.partition('.')[0] for key in stored} == {'architecture', 'teacher'}
    tools('test').main([str(tmp_path / path.name), checkpoint, '--out', str(tmp_path / 'student.pkl')])

    monkeypatch.setattr(sys, 'argv', ['', checkpoint, '--out-path', str(tmp_path / 'student.pth')])
    tools('model_converters/convert_kd_ckpt_to_student').main()
    student = get_model('mmpretrain::resnet/resnet18_8xb32_in1k.py')
    student.load_state_dict(torch.load(tmp_path / 'student.pth')['state_dict'], strict=True)
    student.eval()
    # what the config's preprocessor does with its images of noise, 16 by 16 pixels
    images = torch.stack(
        [torch.from_numpy(cv2.imread(str(tmp_path / f'16-{index}.png'))[..., ::-1].copy()) for index in range(4)]
    ).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    with torch.no_grad():
        expected = student((images - mean) / std).softmax(1)
    found = torch.stack([sample['pred_score'] for sample in load(tmp_path / 'student.pkl')])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_student_of_a_data_free_distillation_is_found_in_its_wrapper():
    weights = {'architecture.module.head.fc.weight': torch.ones(1), 'generator.module.x': torch.ones(1)}
    assert student_weights(weights) == {'head.fc.weight': torch.ones(1)}


# --------------------------------------------------------------------------------------- lines that add the weight


@pytest.fixture
def added(tools, tmp_path):
    """The lines for a config of MMRazor, and what it becomes."""
    add_wsl = tools('add_wsl')

    def add(name, *arguments, **settings):
        path = next((Path(mmrazor.__file__).parent / '.mim/configs/distill/mmcls').glob(f'{name}/*.py'))
        text = add_wsl.fragment(Config.fromfile(path), str(path), *arguments, **settings)
        (tmp_path / 'with_wsl.py').write_text(text)
        return text, Config.fromfile(tmp_path / 'with_wsl.py').model.distiller

    return add


LABELS = dict(recorder='hard_loss', from_student=True, data_idx=1)


@pytest.mark.parametrize(
    'name, replaced, settings',
    [
        ('kd', 'loss_kl', dict(tau=1, loss_weight=3)),  # the first of three: a mean over images
        ('dkd', 'loss_dkd', dict(tau=2.0, loss_weight=2.5)),  # another scale: the paper's
        ('fitnets', 'loss_kl', dict(tau=2.0, loss_weight=2.5)),  # a mean over images and classes: the paper's
        ('byot', 'loss_softl_2', dict(tau=3, loss_weight=0.3)),
        ('dist', 'loss_kl', dict(tau=2.0, loss_weight=2.5)),
        ('wsld', 'loss_wsld', dict(tau=2, loss_weight=2.5)),
        ('deit', 'loss_distill', dict(tau=2.0, loss_weight=2.5, weighting='label_free')),  # mixes images
        ('dafl', 'loss_kl', dict(tau=6, loss_weight=1, weighting='label_free')),  # generates them
    ],
)
def test_a_loss_of_logits_is_replaced(added, name, replaced, settings):
    text, distiller = added(name)
    assert len(text.splitlines()) <= 10 and max(map(len, text.splitlines()[1:])) <= 120
    assert distiller.distill_losses[replaced] == dict(type='mmwsl.WSLLoss', **settings)
    mapping = distiller.loss_forward_mappings[replaced]
    assert mapping.keys() == {'preds_S', 'preds_T', 'gt_labels'}
    labels = mapping.gt_labels
    recorders = distiller.student_recorders if labels.from_student else distiller.teacher_recorders
    assert recorders[labels.recorder] == dict(type='ModuleInputs', source='head.loss_module') and labels.data_idx == 1


@pytest.mark.parametrize('name, source', [('rkd', 'head'), ('crd', 'head'), ('ofd', 'head'), ('dfad', 'res34.head.fc')])
def test_a_loss_is_added_where_there_is_none_of_logits(added, name, source):
    text, distiller = added(name)
    assert len(text.splitlines()) <= 10 and distiller.distill_losses.loss_wsl.type == 'mmwsl.WSLLoss'
    mapping = distiller.loss_forward_mappings.loss_wsl
    assert mapping.preds_S == {**LABELS, 'data_idx': 0} and mapping.gt_labels == LABELS
    assert distiller.teacher_recorders[mapping.preds_T.recorder] == dict(type='ModuleOutputs', source=source)


def test_a_loss_of_logits_is_kept_on_demand_and_settings_are_those_given(added):
    _, distiller = added('kd', True, tau=4.0, loss_weight=None)
    assert distiller.distill_losses.loss_kl.type == 'KLDivergence'
    assert distiller.distill_losses.loss_wsl == dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.5)
    assert distiller.loss_forward_mappings.loss_wsl.preds_T == dict(recorder='fc', from_student=False)
    assert added('kd', tau=None, loss_weight=7.0)[1].distill_losses.loss_kl == dict(
        type='mmwsl.WSLLoss', tau=1, loss_weight=7.0
    )


def test_lines_are_printed_or_written(tools, tmp_path, monkeypatch, capsys):
    name = 'mmrazor::distill/mmcls/dkd/dkd_resnet34_resnet18_8xb32_in1k.py'
    monkeypatch.setattr(sys, 'argv', ['', name])
    tools('add_wsl').main()
    printed = capsys.readouterr().out
    assert printed.splitlines()[1:] == [
        'model = dict(distiller=dict(',
        "    distill_losses=dict(loss_dkd=dict(_delete_=True, type='mmwsl.WSLLoss', tau=2.0, loss_weight=2.5))))",
    ]
    monkeypatch.setattr(sys, 'argv', ['', name, '--out', str(tmp_path / 'a/with_wsl.py')])
    tools('add_wsl').main()
    assert (tmp_path / 'a/with_wsl.py').read_text() == printed
    assert Path(Config.fromfile(tmp_path / 'a/with_wsl.py').model.teacher_ckpt).name.startswith('resnet34_8xb32_in1k')


def test_a_config_to_which_nothing_can_be_added_is_refused(tools):
    add_wsl = tools('add_wsl')
    with pytest.raises(ValueError, match='has no distiller with distill_losses: give the config of a distillation'):
        add_wsl.fragment(Config.fromfile(ROOT / 'configs/vanilla/digits_student.py'), '')
    path = Path(mmrazor.__file__).parent / '.mim/configs/distill/mmcls' / UNTRAINED
    with pytest.raises(ValueError, match='student_trainable=False: no student is trained'):
        add_wsl.fragment(Config.fromfile(path), '')
