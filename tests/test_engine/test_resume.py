import hashlib
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner

from mmwsl.engine import latest_checkpoint
from tests.tiny import ROOT, build, digits_config, distillation, load_tool, network, save_teacher

HOOK = [dict(type='mmwsl.CheckResumeHook')]


@pytest.fixture
def folder(tmp_path):
    """Two checkpoints, and mmengine's pointer to the newer one."""
    for epoch in (1, 2):
        torch.save(dict(state_dict={}, epoch=epoch), tmp_path / f'epoch_{epoch}.pth')
        os.utime(tmp_path / f'epoch_{epoch}.pth', (epoch, epoch))
    torch.save(dict(state_dict={}), tmp_path / 'best_accuracy_epoch_1.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    return tmp_path


def test_the_pointer_is_followed(folder):
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_1.pth'))
    assert latest_checkpoint(folder) == str(folder / 'epoch_1.pth')


@pytest.mark.parametrize('pointer', ['', 'work_dirs/elsewh', '/gone/epoch_9.pth', None])
def test_without_a_pointer_it_is_the_newest(folder, pointer):
    (folder / 'last_checkpoint').unlink()
    if pointer is not None:
        (folder / 'last_checkpoint').write_text(pointer)
    assert latest_checkpoint(folder) == str(folder / 'epoch_2.pth')


def test_a_folder_may_have_moved(folder):
    (folder / 'last_checkpoint').write_text('/where/it/was/epoch_1.pth')
    assert latest_checkpoint(folder) == str(folder / 'epoch_1.pth')


def test_a_checkpoint_in_another_folder_is_said(folder, tmp_path_factory, monkeypatch):
    """As CheckpointHook(out_dir=...) puts it; or the other run's, of which this folder is a part of a copy."""
    told, other = [], tmp_path_factory.mktemp('other')
    monkeypatch.setattr('mmwsl.engine.resume.print_log', lambda text, *_: told.append(text))
    (folder / 'last_checkpoint').write_text(str((folder / 'epoch_2.pth').rename(other / 'epoch_3.pth')))
    assert latest_checkpoint(folder) == str(other / 'epoch_3.pth')
    assert len(told) == 1 and f'a checkpoint in another folder: resuming from {other}/epoch_3.pth.' in told[0]


@pytest.mark.parametrize('way', [['--resume'], ['--cfg-options', 'resume=True']], ids=str)
def test_however_resume_is_asked_for_it_is_the_newest_that_opens(folder, monkeypatch, way):
    (folder / 'last_checkpoint').write_text('')
    train, started, runner = load_tool('train'), [], SimpleNamespace(train=lambda: None)
    config = str(ROOT / 'configs/vanilla/digits_student.py')
    monkeypatch.setattr(train.console, 'build_runner', lambda cfg, verbose: started.append(cfg) or runner)
    monkeypatch.setattr('sys.argv', ['train.py', config, '--work-dir', str(folder), *way])
    train.main()
    assert started[0].resume is True and started[0].load_from == str(folder / 'epoch_2.pth')


def test_a_damaged_checkpoint_is_passed_over(folder):
    (folder / 'epoch_2.pth').write_bytes((folder / 'epoch_2.pth').read_bytes()[:100])
    assert latest_checkpoint(folder) == str(folder / 'epoch_1.pth')
    (folder / 'epoch_1.pth').write_bytes(b'')
    with pytest.raises(RuntimeError, match='none of the checkpoints in .* opens: epoch_2.pth, epoch_1.pth'):
        latest_checkpoint(folder)


def test_an_empty_folder_has_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / 'not_there') is None


def started(work_dir, path, resume):
    """A run that begins from a checkpoint."""
    cfg = digits_config(work_dir, network(2), custom_hooks=HOOK)
    cfg.merge_from_dict(dict(load_from=str(path), resume=resume))
    return Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('resume', [True, False])
def test_checkpoint_of_another_network_is_refused(tmp_path, resume):
    torch.save(dict(state_dict=build(network(4)).state_dict(), meta={}), tmp_path / 'wider.pth')
    with pytest.raises(
        ValueError,
        match=r'not of this model: \d+ of \d+ tensors are missing there or of another shape '
        r'\(backbone.* more\). Is it of another config',
    ):
        started(tmp_path / 'run', tmp_path / 'wider.pth', resume)


def test_another_head_may_start_and_not_resume(tmp_path):
    torch.save(dict(state_dict=build(network(2, classes=7)).state_dict(), meta={}), tmp_path / 'seven.pth')
    started(tmp_path / 'run', tmp_path / 'seven.pth', False)
    with pytest.raises(ValueError, match='head.fc.bias, head.fc.weight'):
        started(tmp_path / 'resumed', tmp_path / 'seven.pth', True)


# ---- networks that begin from a file


def trained(**kwargs):
    """A network whose tensors all differ from those that another one is drawn with."""
    net = build(network(**kwargs))
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape) + 0.5)
    return net


def initialised(work_dir, init_cfg, part=None, alone=True, norm=None, depth=8):
    """A run of a student whose whole, or a part of it, begins from a file; before its first step."""
    student = network(2, depth=depth)
    if norm:
        student['backbone']['norm_cfg'] = norm
    (student[part] if part else student)['init_cfg'] = dict(type='Pretrained', **init_cfg)
    model = student if alone else distillation(architecture=student)
    runner = Runner.from_cfg(
        digits_config(work_dir, model, custom_hooks=HOOK, train_dataloader=dict(num_batch_per_epoch=1))
    )
    runner.train()
    return runner.model if alone else runner.model.student


def saved(path, net, prefix=''):
    torch.save({f'{prefix}{key}': value for key, value in net.state_dict().items()}, path)
    return dict(checkpoint=str(path))


@pytest.mark.parametrize(
    'kwargs, said',
    [
        (dict(channels=4), 'of another shape: backbone'),
        (dict(channels=4, classes=7), 'of another shape: backbone'),
    ],
    ids=['width', 'width and classes'],
)
@pytest.mark.parametrize('alone', [True, False], ids=['alone', 'distilled'])
def test_another_networks_file_is_no_beginning(tmp_path, kwargs, said, alone):
    file = saved(tmp_path / 'other.pth', trained(**kwargs))
    name = 'model' if alone else 'model.architecture'
    with pytest.raises(
        ValueError,
        match=rf"^{name}\.init_cfg: '.*other.pth' is of another network: only \d+ of 47 "
        rf"tensors came from it, and the others are untrained\. {said}.* more\. Give this network's",
    ):
        initialised(tmp_path / 'run', file, alone=alone)


def test_another_normalisation_is_another_network(tmp_path):
    file = saved(tmp_path / 'bn.pth', trained(channels=2, depth=14))
    # weights and biases of 13 layers have other names; those in shortcuts have the same
    with pytest.raises(ValueError, match=r'only 21 of 47 tensors.*missing: backbone.gn1.*unexpected: backbone.bn1'):
        initialised(tmp_path / 'run', file, norm=dict(type='GN', num_groups=1), depth=14)


@pytest.mark.parametrize(
    'prefix, part, advice',
    [
        ('architecture.', None, "It would fit with prefix='architecture.' in init_cfg"),
        ('', 'backbone', "It would fit with prefix='backbone.' in init_cfg"),
    ],
)
def test_a_part_is_asked_for_by_its_prefix(tmp_path, prefix, part, advice):
    file = saved(tmp_path / 'whole.pth', trained(channels=2), prefix)
    with pytest.raises(ValueError, match=f'only 0 of.*{advice}'):
        initialised(tmp_path / 'run', file, part)


def test_a_backbones_file_is_for_the_backbone(tmp_path):
    file = saved(tmp_path / 'backbone.pth', trained(channels=2).backbone)
    with pytest.raises(ValueError, match='It would fit as init_cfg of model.backbone'):
        initialised(tmp_path / 'run', file)


@pytest.mark.parametrize(
    'classes, more, part',
    [
        (10, {}, None),
        (7, {}, None),
        (7, dict(prefix='backbone'), 'backbone'),
        (7, dict(prefix='backbone.'), 'backbone'),
    ],
)
def test_what_fits_begins(tmp_path, classes, more, part):
    theirs = trained(channels=2, classes=classes)
    before = theirs.backbone.conv1.weight.clone()
    ours = initialised(tmp_path / 'run', {**saved(tmp_path / 'a.pth', theirs), **more}, part)
    torch.testing.assert_close(ours.backbone.conv1.weight, before, rtol=0, atol=0.1)  # one step later


def test_what_is_loaded_after_it_counts(tmp_path):
    other = saved(tmp_path / 'other.pth', trained(channels=4))
    torch.save(dict(state_dict=trained(channels=2).state_dict()), tmp_path / 'own.pth')
    student = {**network(2), 'init_cfg': dict(type='Pretrained', **other)}
    cfg = digits_config(tmp_path / 'run', student, custom_hooks=HOOK)
    cfg.load_from = str(tmp_path / 'own.pth')
    Runner.from_cfg(cfg).train()


def test_a_run_is_resumed_with_the_teacher_that_it_was_begun_with(tmp_path):
    def train(teacher, epochs, resume=None, **model):
        cfg = digits_config(
            tmp_path / f'{epochs}',
            distillation(teacher_ckpt=str(tmp_path / teacher), **model),
            epochs,
            custom_hooks=HOOK,
        )
        cfg.merge_from_dict(dict(load_from=resume, resume=bool(resume), experiment_name=f'{epochs}{teacher}{model}'))
        Runner.from_cfg(cfg).train()

    for seed in (1, 2):
        save_teacher(tmp_path / f'{seed}.pth', seed=seed)
    shutil.copy(tmp_path / '1.pth', tmp_path / 'moved.pth')
    train('1.pth', 1)
    begun = str(tmp_path / '1/epoch_1.pth')
    digest, other = (hashlib.sha256((tmp_path / f'{seed}.pth').read_bytes()).hexdigest() for seed in (1, 2))
    assert torch.load(begun, weights_only=False)['meta']['teacher_sha256'] == [digest]
    train('moved.pth', 2, begun)
    with pytest.raises(
        ValueError,
        match=f'begun with another teacher: the SHA-256 of its file is {digest} in the '
        f'checkpoint and {other} here.* give --cfg-options model.teacher_sha256={other}$',
    ):
        train('2.pth', 3, begun)
    train('2.pth', 3, begun, teacher_sha256=other)


def test_a_resume_names_the_settings_that_have_changed(tmp_path):
    def log(name, resume=None, **settings):
        cfg = digits_config(tmp_path / name, network(2), custom_hooks=HOOK, **settings)
        cfg.merge_from_dict(dict(load_from=resume, resume=bool(resume)))
        Runner.from_cfg(cfg).train()
        return next((tmp_path / name).glob('*/*.log')).read_text()

    log('begun')
    begun = str(tmp_path / 'begun/epoch_1.pth')
    assert 'Settings differ' not in log('same', begun)
    said = log('other', begun, randomness=dict(seed=7))
    seeds = [f'randomness = dict(deterministic=False, seed={seed})' for seed in (7, 0)]
    assert f'Settings differ from those of the checkpoint. Only here: {seeds[0]}; only there: {seeds[1]}.' in said
