import importlib.util
import re

import pytest
import yaml
from mmengine.config import Config

from tests.tiny import ROOT

spec = importlib.util.spec_from_file_location('catalogue', ROOT / 'tools/catalogue.py')
catalogue = importlib.util.module_from_spec(spec)
spec.loader.exec_module(catalogue)

STEMS = {path.stem for path in (ROOT / 'configs').rglob('*.py') if '_base_' not in path.parts}


def test_files_are_what_the_configs_and_the_results_give():
    for path, text in catalogue.catalogue().items():
        assert path.read_text() == text, f'{path} is out of step: run tools/catalogue.py'


def test_every_config_has_a_row_and_every_row_a_config():
    rows = re.findall(r'^\| \[(\S+)\]\((\S+)\)', (ROOT / 'configs/README.md').read_text(), re.M)
    assert sorted(name for name, _ in rows) == sorted(STEMS)
    assert all((ROOT / 'configs' / link).stem == name and (ROOT / 'configs' / link).exists() for name, link in rows)


def test_metafile_names_every_config_once():
    content = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())
    models = content['Models']
    assert sorted(model['Name'] for model in models) == sorted(STEMS)
    assert all((ROOT / model['Config']).stem == model['Name'] for model in models)
    assert {model['In Collection'] for model in models} <= {entry['Name'] for entry in content['Collections']}
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index == {'Import': ['configs/metafile.yml']}


def row(name, results):
    cells = catalogue.row(catalogue.read_entry(next((ROOT / 'configs').rglob(f'{name}.py'))), results)
    return dict(zip(catalogue.COLUMNS, cells))


def test_what_was_not_measured_has_an_empty_cell():
    results = dict(published={'a paper': {'wsl_r110_r32_cifar100': 74.1}}, measured={})
    cells = row('wsl_r110_r32_cifar100', results)
    assert (cells['Published'], cells['Source'], cells['Measured'], cells['Log']) == ('74.10', 'a paper', '', '')
    results = dict(published={}, measured={'wsl_r110_r32_cifar100': dict(top1=73.2, log='logs/x.json')})
    cells = row('wsl_r110_r32_cifar100', results)
    assert (cells['Published'], cells['Source'], cells['Measured'], cells['Log']) == ('', '', '73.20', 'logs/x.json')


@pytest.mark.parametrize('name, teacher, student, recipe', [
    ('wsl_wrn40-2_sv1_cifar100', 'WRN-40-2', 'ShuffleNetV1', 'SGD, lr 0.01, 240 epochs, batch 64'),
    ('kd_r34_r18_in1k', 'ResNet-34', 'ResNet-18', 'SGD, lr 0.1, 100 epochs, batch 256'),
    ('wsl_r56-r44-r32_r20_cifar100', 'ResNet-56 + 44 + 32', 'ResNet-20', 'SGD, lr 0.05, 240 epochs, batch 64'),
    ('wsl_digits', 'ResNet-14', 'ResNet-8, 2 channels', 'SGD, lr 0.1, 10 epochs, batch 50'),
    ('vgg8_cifar100', '', 'VGG-8', 'SGD, lr 0.05, 240 epochs, batch 64'),
])
def test_row_says_who_teaches_whom_and_how(name, teacher, student, recipe):
    cells = row(name, dict(published={}, measured={}))
    assert (cells['Teacher'], cells['Student'], cells['Recipe']) == (teacher, student, recipe)


def test_names_in_the_catalogue_are_those_of_the_networks():
    """A short name and the network that the config builds cannot drift apart."""
    for stem in sorted(stem for stem in STEMS if re.fullmatch(r'r\d+_cifar100|wrn.*|vgg\d+_cifar100', stem)):
        depth = Config.fromfile(ROOT / f'configs/vanilla/{stem}.py').model.backbone.depth
        assert re.search(r'\d+', stem)[0] == str(depth)


def test_number_for_a_config_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setattr(catalogue.yaml, 'safe_load', lambda text: dict(published={}, measured=dict(wsl_x_y=1)))
    with pytest.raises(ValueError, match=r"do not exist: \['wsl_x_y'\]"):
        catalogue.catalogue()
