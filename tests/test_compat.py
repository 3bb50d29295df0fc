import contextlib
import datetime
import hashlib
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import types
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import mmcv
import mmengine
import mmengine.runner.checkpoint as mmengine_checkpoint
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OneCycleParamScheduler
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import CheckpointLoader, Runner
from mmrazor.registry import MODELS as MMRAZOR_MODELS
from torch import distributed, nn

from mmwsl import compat
from mmwsl.engine.hooks import sample_record_hook

ROOT = Path(compat.__file__).parents[1]
QUANTIZATION = 'mmrazor.structures.quantization'

# compat.py is loaded by itself: importing mmwsl would already have called every workaround. nullcontext stands for a
# function that does nothing as well as for a context manager that does nothing.
WITHOUT_AND_WITH = """
import contextlib, importlib.util, json

spec = importlib.util.spec_from_file_location('compat', {path!r})
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)

def attempt():
    try:
        compat.ready_the_stack()
        importlib.import_module({module!r})
    except Exception as error:
        return f'{{type(error).__name__}}: {{error}}'
    return 'works'

workaround, compat.{name} = compat.{name}, contextlib.nullcontext
without = attempt()
compat.{name} = workaround
print(json.dumps([without, attempt()]))
"""

RESOLVE = """
import json, sys
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS

found = ['mmwsl' in sys.modules]
for registry, name in ((HOOKS, 'EpochSeedHook'), (DATASETS, 'SeededViews'), (DATASETS, 'Digits'),
                       (DATA_SAMPLERS, 'ViewSampler')):
    found.append(getattr(registry.get('mmwsl.' + name), '__name__', None))
print(json.dumps(found))
"""


WITHOUT_PACKAGES = """
import json, sys

messages = []
for missing in {cases!r}:
    sys.modules.update(dict.fromkeys(missing))  # None: cannot be found
    try:
        import mmwsl.registry
    except ImportError as error:
        messages.append(str(error))
    for name in missing:
        del sys.modules[name]
print(json.dumps([messages, 'torch' in sys.modules]))
"""


STATE = '''
import importlib, json, sys, threading, types
import torch, torch._dynamo, torch.onnx, mmcv.cnn, mmcv.transforms, mmengine.config, mmengine.dataset, mmengine.fileio
import mmengine.hooks, mmengine.runner

def state():
    """What each module of the three holds, and each class of mmengine and mmcv, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in ('torch', 'mmengine', 'mmcv') and module is not None:
            for key, value in list(vars(module).items()):
                if name.startswith('torch') and isinstance(value, types.ModuleType):
                    continue  # torch imports some of its own when they are first used
                found[f'{name}.{key}'] = id(value)
                if isinstance(value, type) and value.__module__.partition('.')[0] in ('mmengine', 'mmcv'):
                    found.update({f'{name}.{key}.{part}': id(held) for part, held in list(vars(value).items())})
    return found

def process():
    return [sorted(map(str, torch.serialization.get_safe_globals())), sorted(t.name for t in threading.enumerate()),
            torch.get_num_threads(), str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
            torch.is_grad_enabled(), torch.initial_seed(), torch.get_rng_state().sum().item()]

kept, before, process_before = list(sys.modules.values()), state(), process()
import mmwsl.registry
after = state()
print(json.dumps([[name for name in before if after.get(name) != before[name]], process() == process_before]))
'''


def in_a_fresh_process(script):
    """What the script prints last, as JSON."""
    done = subprocess.run([sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    'name, module, symptom',
    [
        (
            'make_torchvision_importable',
            'mmpretrain.datasets',
            'RuntimeError: operator torchvision::nms does not exist',
        ),
        ('_mmcv_as_mmrazor_expects', 'mmrazor', 'is used but incompatible'),
        ('_stand_in_for_quantization', 'mmrazor.models', 'ImportError: `torch>=1.13` is not installed properly'),
    ],
    ids=['torchvision', 'mmcv', 'quantization'],
)
def test_import_fails_without_the_workaround_and_works_with_it(name, module, symptom):
    without, with_it = in_a_fresh_process(WITHOUT_AND_WITH.format(path=compat.__file__, name=name, module=module))
    assert with_it == 'works'
    if without == 'works':
        pytest.skip(f'{module} imports here without {name}')
    assert symptom in without


def test_the_registry_changes_how_mmengine_reads_and_loads_and_nothing_else():
    changed, is_same_process = in_a_fresh_process(STATE)
    checkpoint = [f'mmengine.runner.checkpoint.{name}' for name in ('torch', 'load_url', '_safe_torch_load')]
    read = ['mmengine.fileio.handlers.yaml_handler.Loader', 'mmengine.config.config._get_package_and_cfg_path']
    assert set(changed) <= {*read, 'mmengine.hub.hub._get_package_and_cfg_path', *checkpoint}
    assert {*read, *checkpoint[:2]} <= set(changed)
    assert is_same_process


def test_a_missing_stack_names_the_extras_before_anything_is_imported():
    cases = [
        ['mmengine', 'mmcv', 'mmpretrain', 'mmrazor', 'joblib', 'torchvision', 'scipy'],
        ['mmrazor'],
        ['joblib'],
        ['mmpretrain'],
    ]
    messages, imported = in_a_fresh_process(WITHOUT_PACKAGES.format(cases=cases))
    assert [message.partition(' (')[0] for message in messages] == [
        'mmwsl needs mmengine, mmcv, mmpretrain, mmrazor, joblib, torchvision, scipy',
        'mmwsl needs mmrazor',
        'mmwsl needs joblib',
        'mmwsl needs mmpretrain',
    ]
    for message in messages:
        assert 'mmwsl[onedl]' in message and 'mmwsl[openmmlab]' in message
    assert not imported


def test_a_package_of_an_extra_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match=r'sklearn.datasets is not installed. Install mmwsl\[demo\]'):
        DATASETS.build(dict(type='mmwsl.Digits'))
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ImportError, match=r'matplotlib.figure is not installed. Install mmwsl\[demo\]'):
        sample_record_hook._histogram(np.ones(3), epoch=1)


def test_mmengine_finds_mmwsl_by_itself():
    imported_before, *found = in_a_fresh_process(RESOLVE)
    assert not imported_before
    assert found == ['EpochSeedHook', 'SeededViews', 'Digits', 'ViewSampler']


@pytest.mark.parametrize('package', ['mmengine', 'mmpretrain', 'mmrazor'])
@pytest.mark.parametrize(
    'registry, name',
    [
        ('DATASETS', 'SeededViews'),
        ('DATASETS', 'Digits'),
        ('DATA_SAMPLERS', 'ViewSampler'),
        ('HOOKS', 'EpochSeedHook'),
    ],
)
def test_names_resolve_from_every_scope(package, registry, name):
    root = importlib.import_module(f'{package}.registry')
    assert getattr(root, registry).get(f'mmwsl.{name}').__name__ == name


# ------------------------------------------------------------------------------------------------------------ mmcls


@pytest.mark.parametrize(
    'kind, old, new', [(kind, old, new) for kind, names in compat.MMCLS_NAMES.items() for old, new in names.items()]
)
def test_a_name_of_mmcls_is_found_from_each_scope(kind, old, new):
    registries = importlib.import_module('mmpretrain.registry')
    modern = getattr(registries, kind).get(new)
    assert modern.__name__ == new
    root = getattr(registries, kind).parent
    assert getattr(registries, kind).get(old) is modern  # default_scope='mmpretrain'
    assert root.get(f'mmcls.{old}') is modern and root.get(f'mmpretrain.{old}') is modern
    with root.switch_scope_and_registry('mmcls') as registry:
        assert registry.get(old) is modern and registry.get(f'mmcls.{new}') is modern


def test_a_name_of_mmcls_that_is_a_users_own_stays_so(monkeypatch):
    registry = importlib.import_module('mmpretrain.registry').TRANSFORMS
    own = type('PackClsInputs', (), {})
    monkeypatch.setitem(registry.module_dict, 'PackClsInputs', own)
    compat._register_moved_names('TRANSFORMS')
    assert registry.get('PackClsInputs') is own


@pytest.mark.parametrize('old, new', compat.MMCLS_OBJECTS.items())
def test_an_object_of_mmcls_is_imported_under_its_old_name(old, new):
    home = {'ClsDataSample': 'structures', 'ClsVisualizer': 'visualization', 'LinearReduction': 'models.necks'}.get(
        old, 'datasets.transforms.formatting'
    )
    found = getattr(importlib.import_module(f'mmcls.{home}'), old)
    assert found is getattr(importlib.import_module(f'mmpretrain.{home}'), new)


@pytest.mark.parametrize('old, new', compat.MMCLS_MODULES.items())
def test_a_module_of_mmcls_is_found(old, new):
    name = {
        'apis': 'inference_model',
        'models.necks.linear_neck': 'LinearNeck',
        'structures.data_sample': 'DataSample',
        'visualization.visualizer': 'UniversalVisualizer',
    }[new]
    modern = getattr(importlib.import_module(f'mmpretrain.{new}'), name)
    assert getattr(importlib.import_module(f'mmcls.{old}'), name) is modern


@pytest.mark.parametrize('old, new', compat.MMCLS_CONFIGS.items())
def test_a_config_of_mmcls_is_found(old, new):
    package = Path(importlib.import_module('mmpretrain').__file__).parent
    assert not (package / '.mim/configs' / old).exists()
    found, scope = Config._get_cfg_path(f'mmcls::{old}', '')
    assert Path(found) == package / '.mim/configs' / new and scope == 'mmcls'


def test_what_is_not_of_mmcls_is_left_alone():
    assert compat.config_of_today('mmdet::a/b.py') == 'mmdet::a/b.py' and compat.config_of_today('a.py') == 'a.py'
    with pytest.raises(ModuleNotFoundError, match="No module named 'mmcls.nothing'"):
        importlib.import_module('mmcls.nothing')
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec('from mmcls.models import Nothing')
    modern = importlib.import_module('mmpretrain.models')
    importlib.import_module('mmcls.models')
    assert modern.__spec__.name == 'mmpretrain.models' and not hasattr(sys.modules['mmcls.models'], '__file__')


def test_an_installed_mmcls_is_left_alone(monkeypatch):
    finders = list(sys.meta_path)
    monkeypatch.setattr(compat, '_is_installed', lambda package: package == 'mmcls')
    compat.let_mmcls_mean_mmpretrain()
    assert sys.meta_path == finders


def test_mmrazors_classes_that_derive_from_mmcls_can_be_built():
    """DeiT's backbone gives (class token, distillation token), and mmrazor's head takes the patch tokens, too."""
    head = MMRAZOR_MODELS.build(dict(type='mmrazor.DeiTClsHead', num_classes=3, in_channels=4))
    recorded = []
    head.layers.head_dist.register_forward_hook(lambda _, inputs, __: recorded.append(inputs[0]))
    tokens = torch.randn(2, 4), torch.randn(2, 4)
    expected = head.layers.head(tokens[0])
    for last in (tokens, [torch.randn(2, 16, 4), *tokens]):
        torch.testing.assert_close(head((last,)), expected, rtol=0, atol=0)
    assert [value is tokens[1] for value in recorded] == [True, True]
    packed = TRANSFORMS.build(dict(type='mmrazor.PackCRDClsInputs')).transform(
        dict(img=np.zeros((2, 2, 3), np.uint8), gt_label=1, sample_idx=7, contrast_sample_idxs=np.array([7, 3]))
    )
    assert packed['data_samples'].contrast_sample_idxs.tolist() == [7, 3]


def test_a_classifier_within_a_model_of_mmrazor_has_its_preprocessor():
    with MMRAZOR_MODELS.switch_scope_and_registry('mmrazor') as registry:
        built = registry.build(
            dict(
                type='mmcls.ImageClassifier',
                backbone=dict(type='mmcls.LeNet5'),
                data_preprocessor=dict(mean=[7.0], std=[1.0]),
            )
        )
    assert type(built.data_preprocessor).__name__ == 'ClsDataPreprocessor'
    assert built.data_preprocessor.mean.item() == 7


def test_a_download_that_fails_names_the_place_for_the_file(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError('no route to host')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', unreachable)
    url = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet34_8xb32_in1k_20210831-f257d4e6.pth'
    place = compat.kept_download(url, tmp_path)
    for load in (
        partial(compat.downloaded, url, tmp_path),
        partial(mmengine_checkpoint.load_url, url, model_dir=str(tmp_path)),
    ):
        with pytest.raises(
            FileNotFoundError,
            match=f'no route to host.*copy resnet34_8xb32_in1k_20210831-f257d4e6.pth here as {re.escape(str(place))}',
        ):
            load()
    torch.save(dict(state_dict={}), place)
    assert compat.downloaded(url, tmp_path) == place


# ------------------------------------------------------------------------------------------------------ torchvision


@pytest.fixture
def fake_torchvision(monkeypatch, tmp_path):
    """Put a package of one file in torchvision's place."""

    def put(source):
        for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / 'torchvision.py').write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(compat, '_libraries', [])

    return put


def test_torchvision_that_imports_is_left_alone(fake_torchvision, recwarn):
    fake_torchvision('')
    compat.make_torchvision_importable()
    assert not recwarn
    assert compat._libraries == []


def test_torchvision_that_is_already_imported_is_left_alone(monkeypatch):
    monkeypatch.setattr(compat, '_libraries', [])
    before = sys.modules['torchvision']
    compat.make_torchvision_importable()
    assert sys.modules['torchvision'] is before
    assert compat._libraries == []


def test_torchvision_that_fails_half_way_is_imported_afresh(fake_torchvision):
    fake_torchvision("""
import pathlib, sys, types
attempted = pathlib.Path(__file__).with_name('attempted')
if 'torchvision.half' in sys.modules:
    raise RuntimeError('remains of the first attempt')
if not attempted.exists():
    attempted.touch()
    sys.modules['torchvision.half'] = types.ModuleType('torchvision.half')
    raise RuntimeError('operator torchvision::nms does not exist')
""")
    with pytest.warns(UserWarning, match=r'built for another torch than 2\..*nms does not exist.*both from one index'):
        compat.make_torchvision_importable()
    assert 'torchvision' in sys.modules
    assert len(compat._libraries) == 1  # kept: the operators go with it


def test_other_errors_of_torchvision_are_not_hidden(fake_torchvision):
    fake_torchvision('raise RuntimeError("something else")')
    with pytest.raises(RuntimeError, match='something else'):
        compat.make_torchvision_importable()
    assert compat._libraries == []


def test_mmcv_keeps_its_version():
    assert mmcv.__version__ == mmcv.version.__version__


@pytest.mark.parametrize(
    'real, shown',
    [
        ('2.0.0', '2.0.0'),
        ('2.1.0', '2.1.0'),
        ('2.2.0', '2.1.0'),
        ('2.3.6', '2.1.0'),
        ('2.10.0', '2.1.0'),
    ],
)
def test_mmrazor_sees_an_mmcv_that_it_accepts(monkeypatch, real, shown):
    monkeypatch.setattr(mmcv, '__version__', real)
    with compat._mmcv_as_mmrazor_expects():
        assert mmcv.__version__ == shown
    assert mmcv.__version__ == real


def test_mmcv_gets_its_version_back_after_an_error(monkeypatch):
    monkeypatch.setattr(mmcv, '__version__', '2.3.6')
    with pytest.raises(ImportError), compat._mmcv_as_mmrazor_expects():
        raise ImportError
    assert mmcv.__version__ == '2.3.6'


def test_quantization_that_imports_is_left_alone(monkeypatch):
    real = types.ModuleType(QUANTIZATION)
    structures = sys.modules['mmrazor.structures']
    monkeypatch.setitem(sys.modules, QUANTIZATION, real)
    compat._stand_in_for_quantization()
    assert sys.modules[QUANTIZATION] is real
    assert sys.modules['mmrazor.structures'] is structures


def test_forgets_a_package_but_not_its_namesakes(monkeypatch):
    for name in ('half', 'half.way', 'halfway'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    compat._forget_modules('half')
    assert [name for name in sys.modules if name.startswith('half')] == ['halfway']


def test_quantizing_says_why_it_cannot():
    with pytest.raises(ImportError, match='cannot quantize with torch') as error:
        compat._NoQuantization('qconfig', bits=8)
    assert torch.__version__ in str(error.value)


# ------------------------------------------------------------------------------------------------------ checkpoints


class Tiny(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        return dict(loss=self.linear(inputs).square().mean())


def tiny_runner(work_dir, max_epochs=1, **kwargs):
    """A run of 4 iterations an epoch. The scope is the project's: mmengine remembers it after the run."""
    return Runner(
        model=Tiny(),
        work_dir=str(work_dir),
        experiment_name=Path(work_dir).name,
        default_scope='mmpretrain',
        train_dataloader=dict(
            dataset=[dict(inputs=torch.tensor([i, 1.0])) for i in range(8)],
            batch_size=2,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        log_level='ERROR',
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A checkpoint that mmengine's Runner wrote."""
    runner = tiny_runner(tmp_path_factory.mktemp('trained'))
    runner.train()
    return Path(runner.work_dir) / 'epoch_1.pth'


class Payload:
    """Calls a function where it is unpickled; callable itself, so that pickle takes one for a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError('only for pickle to see')


SAVE = {
    'zip': torch.save,
    'legacy': lambda data, path: torch.save(data, path, _use_new_zipfile_serialization=False),
    'pickle': lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2)),
}
HARM = {
    'os.system': lambda marker: Payload(os.system, f'echo harm > "{marker}"'),
    'os.mkdir': lambda marker: Payload(os.mkdir, str(marker)),
    'exec': lambda marker: Payload(exec, f'open({str(marker)!r}, "w").close()'),
    'getattr': lambda marker: Payload(Payload(getattr, np.ndarray, 'tofile'), np.arange(3), str(marker)),
}


def load(path):
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


def test_loads_what_the_runner_wrote(trained):
    checkpoint = load(trained)
    assert set(checkpoint['state_dict']) == {'linear.weight', 'linear.bias'}
    assert checkpoint['meta']['epoch'] == 1
    history = checkpoint['message_hub']['log_scalars']['train/loss']
    assert type(history) is HistoryBuffer
    assert len(history.data[0]) == 4
    assert history.statistics('mean') == history.mean()  # the statistics are stored as getattr(HistoryBuffer, ...)


def test_resumes_from_what_the_runner_wrote(trained, tmp_path):
    runner = tiny_runner(tmp_path, max_epochs=2, load_from=str(trained), resume=True)
    runner.train()
    assert (runner.epoch, runner.iter) == (2, 8)
    assert len(runner.message_hub.get_scalar('train/loss').data[0]) == 8  # 4 of them from the checkpoint


@pytest.mark.parametrize('kind', ['float32', 'float64', 'int32', 'int64', 'uint32', 'bool'])
def test_loads_numpy_values_of_each_kind(kind, tmp_path):
    values = np.array([0, 1, 1], dtype=kind)
    torch.save(dict(scalar=values[1], history=HistoryBuffer(values, [1, 1, 1])), tmp_path / 'a.pth')
    loaded = load(tmp_path / 'a.pth')
    assert loaded['scalar'].dtype == kind and loaded['scalar'] == values[1]
    history = loaded['history'].data[0]
    assert history.dtype == kind and history.tolist() == values.tolist()


def test_loads_what_was_written_beside_numpy_1(tmp_path):
    path = tmp_path / 'a.pth'
    SAVE['legacy'](dict(scalar=np.float64(2), array=np.arange(3)), path)
    # numpy 2 renamed numpy.core; the names end in a newline there, so that their length is free
    path.write_bytes(path.read_bytes().replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'))
    loaded = load(path)
    assert loaded['scalar'] == 2 and loaded['array'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('harm', HARM)
@pytest.mark.parametrize('form', SAVE)
def test_refuses_a_file_that_runs_code(tmp_path, form, harm):
    path, marker = tmp_path / 'harmful.pth', tmp_path / 'marker'
    SAVE[form](dict(state_dict={}, extra=HARM[harm](marker)), path)
    with pytest.raises(compat.UnsafeCheckpointError, match='was not loaded') as error:
        load(path)
    assert str(path) in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize('harm', HARM)
def test_the_harm_above_is_real(tmp_path, harm):
    pickle.loads(pickle.dumps(HARM[harm](tmp_path / 'marker')))
    assert (tmp_path / 'marker').exists()


@pytest.mark.parametrize(
    'trick',
    [
        Payload(getattr, HistoryBuffer, '__init__'),
        Payload(getattr, HistoryBuffer, 'register_statistics'),
        Payload(getattr, HistoryBuffer, '__subclasses__'),
        Payload(getattr, Payload(getattr, HistoryBuffer, 'mean'), '__globals__'),
        Payload(getattr, np.ndarray, 'max'),
        Payload(getattr, dict, 'current'),
        Payload(getattr, 'text', 'min'),
    ],
    ids=['init', 'register', 'subclasses', 'globals', 'ndarray', 'dict', 'text'],
)
def test_refuses_getattr_on_anything_but_a_statistic(tmp_path, trick):
    path = tmp_path / 'trick.pth'
    torch.save(dict(state_dict={}, extra=trick), path)
    with pytest.raises(compat.UnsafeCheckpointError) as error:
        load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('name', ['min', 'max', 'mean', 'current'])
def test_a_statistic_is_the_one_that_is_named(name):
    assert compat._stored_method(HistoryBuffer, name) is getattr(HistoryBuffer, name)


@pytest.mark.parametrize('form', SAVE)
@pytest.mark.parametrize('kept', [0.1, 0.5, 0.9])
def test_a_truncated_file_is_an_error_and_runs_nothing(tmp_path, form, kept):
    path, marker = tmp_path / 'cut.pth', tmp_path / 'marker'
    SAVE[form](dict(extra=HARM['os.mkdir'](marker), weight=torch.zeros(1000).tolist()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(RuntimeError, match='was not loaded'):
        load(path)
    assert not marker.exists()


@pytest.mark.parametrize('form', ['zip', 'legacy'])
def test_a_truncated_good_file_is_an_error(tmp_path, form):
    path = tmp_path / 'cut.pth'
    SAVE[form](dict(state_dict=Tiny().state_dict(), history=HistoryBuffer([1.0], [1])), path)
    content = path.read_bytes()
    for damaged in (b'', content[: len(content) // 2], b'hello', b'A picture'):
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match='cut.pth was not loaded: it is damaged'):
            load(path)


@pytest.fixture
def harmful(tmp_path):
    """A file that makes the folder `harm` beside it where it is unpickled."""
    path = tmp_path / 'harmful.pth'
    torch.save(dict(state_dict={}, extra=Payload(os.mkdir, str(tmp_path / 'harm'))), path)
    return path


def test_torch_outside_mmengine_is_left_alone(trained, harmful):
    before = set(torch.serialization.get_safe_globals())
    load(trained)
    with pytest.raises(compat.UnsafeCheckpointError):
        load(harmful)
    assert set(torch.serialization.get_safe_globals()) == before
    assert torch.load is torch.serialization.load
    assert torch.load.__module__ == 'torch.serialization'
    assert torch.hub.load_state_dict_from_url.__module__ == 'torch.hub'
    with pytest.raises(pickle.UnpicklingError):
        torch.load(trained, weights_only=True)  # only mmengine's loader knows HistoryBuffer


class Door:
    """A lock that tells when a thread had to wait for it."""

    def __init__(self):
        self.lock, self.waited = threading.RLock(), threading.Event()

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waited.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_threads_that_load_at_once_leave_torch_as_it_was(trained, monkeypatch):
    real, door, together, done = torch.load, Door(), threading.Barrier(6), threading.Event()
    entered = []

    def load_in_company(*args, **kwargs):
        """The first stays until another has come to the door, or through it; the others until the first has left."""
        entered.append(threading.get_ident())
        if len(entered) == 1:
            door.waited.wait()
        else:
            door.waited.set()
            done.wait()
        return real(*args, **kwargs)

    def load_with_others():
        together.wait()
        try:
            return load(trained)['meta']['epoch']
        finally:
            done.set()

    monkeypatch.setattr(torch, 'load', load_in_company)
    monkeypatch.setattr(compat, '_safe_globals_lock', door)
    with torch.serialization.safe_globals([OneCycleParamScheduler]), ThreadPoolExecutor(6) as pool:
        before = set(torch.serialization.get_safe_globals())
        loads = [pool.submit(load_with_others) for _ in range(6)]
        assert [each.result() for each in loads] == [1] * 6
        assert set(torch.serialization.get_safe_globals()) == before


def test_what_the_caller_allows_stays_allowed(trained):
    with torch.serialization.safe_globals([HistoryBuffer, np.dtype]):
        before = set(torch.serialization.get_safe_globals())
        load(trained)
        assert set(torch.serialization.get_safe_globals()) == before


def test_mmengine_sees_the_rest_of_torch():
    assert mmengine_checkpoint.torch.nn is torch.nn
    assert mmengine_checkpoint.torch.save is torch.save


def test_load_without_a_location_or_with_other_wishes(harmful):
    with pytest.raises(compat.UnsafeCheckpointError):
        mmengine_checkpoint.torch.load(harmful)
    with pytest.raises(compat.UnsafeCheckpointError):
        mmengine_checkpoint.torch.load(harmful, map_location='cpu', weights_only=False)
    assert not (harmful.parent / 'harm').exists()


def test_load_keeps_the_location(trained):
    weight = CheckpointLoader.load_checkpoint(str(trained), map_location='meta')['state_dict']['linear.weight']
    assert weight.device.type == 'meta'


def test_downloads_ask_for_weights_only(monkeypatch):
    asked = []
    monkeypatch.setattr(compat, 'downloaded', lambda url, *_: Path('/nowhere/0123-a.pth'))
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', lambda *args, **kwargs: asked.append((args, kwargs)))
    load('https://example.invalid/a.pth')
    (url, *_), wishes = asked[0]
    assert url == 'https://example.invalid/a.pth'
    assert wishes == dict(weights_only=True, file_name='0123-a.pth')
    assert asked[0][0][1:3] == ('/nowhere', 'cpu')


def test_a_download_that_runs_code_is_refused(harmful, trained, tmp_path):
    fetched = mmengine_checkpoint.load_url(trained.as_uri(), model_dir=str(tmp_path / 'cache'), progress=False)
    assert 'state_dict' in fetched
    with pytest.raises(compat.UnsafeCheckpointError, match='harmful.pth'):
        mmengine_checkpoint.load_url(
            harmful.as_uri(), model_dir=str(tmp_path / 'cache'), progress=False, weights_only=False
        )
    assert not (tmp_path / 'harm').exists()


def test_files_of_one_name_at_two_addresses_are_two(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        torch.save(dict(number=number), tmp_path / f'{number}/model.pth')
    cache = str(tmp_path / 'cache')
    found = [
        mmengine_checkpoint.load_url((tmp_path / f'{number}/model.pth').as_uri(), model_dir=cache, progress=False)
        for number in (1, 2, 1)
    ]
    assert [one['number'] for one in found] == [1, 2, 1]
    assert len(list((tmp_path / 'cache').iterdir())) == 2


@pytest.mark.parametrize('right', [True, False])
def test_a_download_of_before_is_used_if_its_content_is_what_its_name_says(tmp_path, right):
    path = tmp_path / 'there.pth'
    torch.save({}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8] if right else '0' * 8
    named = path.rename(tmp_path / f'net_20200101-{digest}.pth')
    kept = tmp_path / 'cache' / named.name
    kept.parent.mkdir()
    shutil.copy(named, kept)
    assert (compat.downloaded(named.as_uri(), kept.parent) == kept) is right
    assert len(list(kept.parent.iterdir())) == (1 if right else 2)


def flips(content, number):
    """Copies of a file with one flipped bit each."""
    chosen = random.Random(0)
    for _ in range(number):
        flipped = bytearray(content)
        flipped[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        yield flipped


def test_a_flipped_bit_is_found_or_changes_no_weight(tmp_path):
    path, weights = tmp_path / 'a.pth', dict(weight=torch.randn(30, 30), bias=torch.randn(30))
    torch.save(dict(state_dict=weights), path)
    found = 0
    for content in flips(path.read_bytes(), 400):
        path.write_bytes(content)
        try:
            torch.testing.assert_close(load(path)['state_dict'], weights, rtol=0, atol=0)
        except (RuntimeError, compat.UnsafeCheckpointError) as error:
            assert f'{path} was not loaded' in str(error)
            found += 1
    assert found > 200  # the others are in the padding between tensors


def test_checksums_are_compared_in_what_is_no_path(tmp_path):
    stream = io.BytesIO()
    torch.save(dict(weight=torch.ones(100)), stream)
    content = bytearray(stream.getvalue())
    stream.seek(0)
    assert mmengine_checkpoint.torch.load(stream)['weight'].sum() == 100
    content[content.index(torch.ones(100).numpy().tobytes())] ^= 1
    with pytest.raises(RuntimeError, match='it is damaged .the checksum of archive/data/0 does not match'):
        mmengine_checkpoint.torch.load(io.BytesIO(content))


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(weight=torch.ones(2)), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert load(tmp_path / 'a.pth')['weight'].sum() == 2


def test_checkpoints_are_unusable_or_unsafe_without_the_workaround(monkeypatch, trained, harmful):
    spec = importlib.util.spec_from_file_location('fresh_checkpoint', mmengine_checkpoint.__file__)
    fresh = importlib.util.module_from_spec(spec)  # a copy that the workaround has not touched
    spec.loader.exec_module(fresh)

    def outcome():
        loaded = []
        for path in (trained, harmful):
            with contextlib.suppress(pickle.UnpicklingError, compat.UnsafeCheckpointError):
                fresh.CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
                loaded.append(path)
        return loaded, (harmful.parent / 'harm').exists()

    without = outcome()
    if without[1]:
        (harmful.parent / 'harm').rmdir()
    monkeypatch.setattr(compat, 'mmengine_checkpoint', fresh)
    compat.load_only_weights()
    assert outcome() == ([trained], False)
    if without == ([trained], False):
        pytest.skip('mmengine loads what it should, and nothing else, by itself')
    assert without in (([], False), ([trained, harmful], True))  # 0.10.7; 0.10.12, or 0.10.7 with torch < 2.6


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture
def one_process(monkeypatch):
    """What a launcher tells a process that is alone. Port 0: the system picks one that is free."""
    told = dict(
        RANK='0',
        WORLD_SIZE='1',
        LOCAL_RANK='0',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT='0',
        OMP_NUM_THREADS='1',
        MKL_NUM_THREADS='1',
    )  # mmengine would set the last two for good
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def test_starts_gloo_and_names_no_device(one_process):
    cfg = ConfigDict(launcher='pytorch')
    compat.distribute_without_cuda(cfg)
    assert distributed.get_backend() == 'gloo'
    assert distributed.get_world_size() == 1
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=False, device_ids=None
    )


def test_passes_on_find_unused_parameters(one_process):
    cfg = ConfigDict(launcher='pytorch', find_unused_parameters=True)
    compat.distribute_without_cuda(cfg)
    assert cfg.model_wrapper_cfg.find_unused_parameters is True


def test_keeps_a_given_wrapper(one_process):
    given = dict(type='mmrazor.MMRazorDDP', broadcast_buffers=True, find_unused_parameters=True, device_ids=[0])
    cfg = ConfigDict(launcher='pytorch', find_unused_parameters=False, model_wrapper_cfg=given)
    compat.distribute_without_cuda(cfg)
    assert cfg.model_wrapper_cfg == dict(given, device_ids=None)


def test_keeps_a_group_that_exists(one_process):
    distributed.init_process_group('gloo')
    group = distributed.group.WORLD
    compat.distribute_without_cuda(ConfigDict(launcher='pytorch'))
    assert distributed.group.WORLD is group


def test_asks_slurm_for_the_rank(one_process, monkeypatch):
    monkeypatch.delenv('RANK')
    monkeypatch.delenv('WORLD_SIZE')
    monkeypatch.setenv('SLURM_PROCID', '0')
    monkeypatch.setenv('SLURM_NTASKS', '1')
    compat.distribute_without_cuda(ConfigDict(launcher='slurm'))
    assert (distributed.get_rank(), distributed.get_world_size()) == (0, 1)
    assert (os.environ['RANK'], os.environ['WORLD_SIZE']) == ('0', '1')


@pytest.mark.parametrize(
    'cfg, cuda',
    [
        (dict(launcher='none'), False),
        (dict(), False),
        (dict(launcher='pytorch'), True),
    ],
    ids=['launcher none', 'no launcher', 'cuda'],
)
def test_does_nothing_where_nothing_is_needed(one_process, monkeypatch, cfg, cuda):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    after = ConfigDict(cfg)
    compat.distribute_without_cuda(after)
    assert after == cfg
    assert not distributed.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason='mmengine itself distributes over CUDA devices')
def test_a_distributed_run_fails_without_the_workaround_and_works_with_it(one_process, tmp_path):
    cfg = Config(dict(launcher='pytorch'))
    with pytest.raises((AssertionError, AttributeError, RuntimeError), match='(?i)cuda|nvidia'):
        tiny_runner(tmp_path / 'no_group', cfg=cfg, launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='gloo')))
    distributed.init_process_group('gloo')
    with pytest.raises(ValueError, match='device_ids'):
        tiny_runner(tmp_path / 'no_wrapper', cfg=cfg, launcher='pytorch')
    distributed.destroy_process_group()

    compat.distribute_without_cuda(cfg)
    runner = tiny_runner(tmp_path / 'both', cfg=cfg, launcher='pytorch')
    runner.train()
    assert type(runner.model) is MMDistributedDataParallel
    assert (tmp_path / 'both' / 'epoch_1.pth').exists()


@pytest.mark.parametrize(
    'launcher, rank, size',
    [('slurm', 'SLURM_PROCID', 'SLURM_NTASKS'), ('mpi', 'OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE')],
)
def test_other_launchers_name_their_processes(monkeypatch, launcher, rank, size):
    # a copy, so that what is set is forgotten with the test
    monkeypatch.setattr(compat.os, 'environ', {rank: '3', size: '8', 'SLURM_NODELIST': 'node[1-2]'})
    monkeypatch.setattr(compat.subprocess, 'check_output', lambda command, text: 'node1\nnode2\n')
    compat._name_the_processes(launcher)
    environment = {name: os.environ.get(name) for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT', 'MASTER_ADDR')}
    address = 'node1' if launcher == 'slurm' else None  # Open MPI does not know one: it is the user's
    assert environment == dict(RANK='3', WORLD_SIZE='8', MASTER_PORT='29500', MASTER_ADDR=address)


@pytest.mark.parametrize(
    'stored',
    [
        ConfigDict(palette=[[1, 2, 3]], nested=ConfigDict(classes=('a', 'b'))),
        Path('data/mine'),
        frozenset({1}),
        datetime.datetime(2026, 1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_that_a_dataset_stores_beside_weights_is_read(tmp_path, stored):
    torch.save(dict(state_dict={}, meta=dict(dataset_meta=dict(mine=stored))), tmp_path / 'a.pth')
    assert load(tmp_path / 'a.pth')['meta']['dataset_meta']['mine'] == stored


def test_a_device_that_is_not_there_is_no_damage(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.ones(2))), tmp_path / 'a.pth')
    with pytest.raises((RuntimeError, AssertionError)) as error:
        CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), map_location='cuda:99')
    assert 'damaged' not in str(error.value)


def test_no_memory_is_no_damage(tmp_path, monkeypatch):
    torch.save(dict(state_dict={}), tmp_path / 'a.pth')

    def full(*args, **kwargs):
        raise RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(torch, 'load', full)
    with pytest.raises(RuntimeError, match='^CUDA out of memory'):
        load(tmp_path / 'a.pth')


def test_a_torchscript_archive_is_named(tmp_path):
    torch.jit.script(nn.Linear(2, 1)).save(tmp_path / 'a.pth')
    with pytest.raises(compat.UnsafeCheckpointError, match='is a TorchScript archive.*torch.jit.load'):
        load(tmp_path / 'a.pth')


# ------------------------------------------------------------------------------------------- YAML and stored configs


@pytest.mark.parametrize(
    'text',
    [
        "!!python/object/apply:os.mkdir ['{}']",
        "!!python/object/new:os.mkdir ['{}']",
        '!!python/name:os.mkdir',
        '!!python/module:os',
        '!!python/object:types.SimpleNamespace {{}}',
    ],
)
@pytest.mark.parametrize('place', ['config', 'base', 'load'])
def test_yaml_runs_no_code(tmp_path, text, place):
    marker, path = tmp_path / 'marker', tmp_path / 'a.yml'
    path.write_text(f'model: {text.format(marker)}\n')
    if place == 'base':
        path = tmp_path / 'b.yaml'
        path.write_text('_base_: a.yml\n')
    with pytest.raises(ValueError, match='!!python/.* was not read, .* line 1.* as a .py config') as error:
        mmengine.load(path) if place == 'load' else Config.fromfile(path)
    assert not marker.exists() and len(str(error.value)) < 400


def test_yaml_is_read_as_mmengine_writes_it(tmp_path):
    cfg = Config(dict(model=dict(mean=(1.5, 2), nested=((1, 2), [3]), name='a', on=True, none=None)))
    cfg.dump(tmp_path / 'a.yml')
    assert 'python/tuple' in (tmp_path / 'a.yml').read_text()
    assert Config.fromfile(tmp_path / 'a.yml').to_dict() == cfg.to_dict()


def test_a_config_in_a_checkpoint_is_not_run(tmp_path, trained):
    """mmengine runs what is called config in its meta, and stores its own as cfg."""
    saved = torch.load(trained, weights_only=False)
    saved['meta']['config'] = f'import os\nos.mkdir({str(tmp_path / "marker")!r})\n'
    torch.save(saved, tmp_path / 'a.pth')
    runner = tiny_runner(tmp_path / 'resumed', 2, resume=True, load_from=str(tmp_path / 'a.pth'))
    runner.train()
    assert not (tmp_path / 'marker').exists() and runner.epoch == 2


class OldBatches:
    """Of a dataloader, as mmengine 0.10.7's loop reads it: nothing can be skipped."""

    def __init__(self, dataloader):
        self.batches = iter(dataloader)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)


def test_an_old_loop_throws_no_loaded_batches_away():
    loop = types.SimpleNamespace(dataloader_iterator=OldBatches('ab'), dataloader='xyz', iter=3)
    next(loop.dataloader_iterator)
    compat.restart_batches(loop)
    assert [next(loop.dataloader_iterator) for _ in range(5)] == [None, None, None, 'x', 'y']


def test_a_transformers_without_what_mmpretrain_derives_from_is_no_error(tmp_path):
    """Stand-ins for transformers 5, where pytorch_utils has lost functions, and pycocotools."""
    for name, number in (('transformers', '5.17.0'), ('pycocotools', '2.0.11')):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').touch()
        (tmp_path / f'{name}-{number}.dist-info').mkdir()
        (tmp_path / f'{name}-{number}.dist-info/METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n'
        )
    (tmp_path / 'transformers/pytorch_utils.py').touch()
    code = (
        'import mmwsl.registry\nfrom mmpretrain.registry import MODELS\nprint(MODELS.get("ImageClassifier"))\n'
        'MODELS.build(dict(type="BlipVQA"))'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}:{tmp_path}'},
    )
    assert 'mmpretrain.models.classifiers.image.ImageClassifier' in done.stdout, done.stderr
    assert 'requires extra multi-modal dependencies' in done.stderr
