import re

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from PIL import Image

from tests.tiny import ROOT, build

README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', README, re.DOTALL)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The example for one's own data, as a config file beside the others', with the data it speaks of."""
    for split in ('train', 'val'):
        for label in range(20):
            folder = tmp_path / f'data/mine/{split}/class{label:02}'
            folder.mkdir(parents=True)
            Image.new('RGB', (40, 30), (label, 0, 0)).save(folder / 'image.png')
    block = next(block for block in BLOCKS if 'data/mine' in block)
    (tmp_path / 'own.py').write_text(block.replace("'wsl_r34", f"'{ROOT}/configs/wsl_r34"))
    monkeypatch.chdir(tmp_path)
    return Config.fromfile(tmp_path / 'own.py')


def test_own_data_is_read_as_the_example_says(own_data):
    init_default_scope('mmpretrain')
    for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = DATASETS.build(own_data[field].dataset)
        dataset.full_init()
        assert len(dataset) == 20 and len(dataset.metainfo['classes']) == 20
        assert dataset[0]['inputs'].shape == (3, 224, 224)


def test_own_classes_reach_both_networks(own_data):
    model = own_data.model
    assert model.architecture.head.num_classes == model.teacher.head.num_classes == 20
    assert model.teacher_ckpt == 'checkpoints/my_teacher.pth'


def test_distiller_of_the_example_builds():
    scope = {}
    exec(next(block for block in BLOCKS if 'distiller = dict' in block), scope)
    init_default_scope('mmpretrain')
    assert set(MODELS.build(scope['distiller']).distill_losses) == {'loss_wsl', 'loss_features'}
    cfg = Config.fromfile(ROOT / 'configs/wsl_r34_r18_in1k.py').model
    # its recorders name layers that these networks have
    build({**cfg, 'distiller': scope['distiller'], 'teacher_ckpt': None,
           'data_preprocessor': dict(type='mmpretrain.ClsDataPreprocessor')})


def test_python_example_runs():
    import torch
    scope = dict(student=torch.randn(4, 10), teacher=torch.randn(4, 10), target=torch.arange(4))
    exec(next(block for block in BLOCKS if 'wsl_weight' in block), scope)
    assert scope['loss'] > 0


def test_commands_name_files_that_exist():
    for path in re.findall(r'(?:tools|configs)/[\w/.-]+\.(?:py|sh)', README):
        assert (ROOT / path).exists(), path


def test_the_pages_of_docs_name_files_that_exist():
    for page in (ROOT / 'docs').glob('*.md'):
        text = page.read_text().replace('$A/', 'configs/ablations/')
        for path in re.findall(r'(?:tools|configs)/[\w/.-]+\.(?:py|sh)', text):
            assert (ROOT / path).exists(), path
        for path in re.findall(r'\]\((?!http)(.*?)\)', text):
            assert (page.parent / path).exists(), path
