"""The rules of the house: who imports whom, who patches, and that every module readies the stack."""

import ast
import graphlib
import importlib
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest

from tests.tiny import ROOT

# From the ground up: a module imports from its own floor and from those below. The longest name that fits counts.
FLOORS = (
    'mmwsl.version',
    'mmwsl.functional',
    'mmwsl.compat',
    'mmwsl.registry',
    'mmwsl.utils',
    'mmwsl.cache',
    'mmwsl.datasets',
    'mmwsl.models.backbones',
    'mmwsl.models.weightings',
    'mmwsl.models.losses',
    'mmwsl.models.teachers',
    'mmwsl.models.distillers',
    'mmwsl.models.algorithms',
    'mmwsl.models',
    'mmwsl.analysis',
    'mmwsl.engine',
)
EXTRAS = {'mmwsl.models.losses.kernel': 'triton'}  # modules that need a package beyond the stack
GROUND = {'mmwsl', 'mmwsl.version', 'mmwsl.functional'}  # modules that need no stack
MOVED = {
    'mmwsl.hooks': 'mmwsl.engine.hooks',
    'mmwsl.models.classifiers': 'mmwsl.models.teachers',
    'mmwsl.models.losses.functional': 'mmwsl.functional',
    'mmwsl.cache.build': 'mmwsl.engine.cache_building',
    'mmwsl.cache.records': 'mmwsl.cache.answers',
    'mmwsl.datasets.resample': 'mmwsl.datasets.bootstrap_dataset',
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


TREES = {name_of(path): ast.parse(path.read_text()) for path in sorted((ROOT / 'mmwsl').rglob('*.py'))}


def moved(node):
    """Whether a module or function says that it only keeps an old name."""
    return isinstance(node, (ast.Module, ast.FunctionDef)) and (ast.get_docstring(node) or '').startswith('Moved to')


def imports(node, modules=frozenset(TREES)):
    """Modules that a piece of code imports anywhere, old names left out."""
    if moved(node):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, 'imports are absolute'
        for alias in node.names:
            full = f'{node.module}.{alias.name}'
            yield full if full in modules else node.module
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
        yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
    for child in ast.iter_child_nodes(node):
        yield from imports(child, modules)


def of_the_house(names):
    return {name for name in names if name.split('.')[0] == 'mmwsl'}


def foreign(names):
    return {name for name in names if name.split('.')[0] not in {'mmwsl', *sys.stdlib_module_names}}


GRAPH = {name: of_the_house(imports(tree)) - {name} for name, tree in TREES.items()}


# ----------------------------------------------------------------------------------------------------------- floors


def floor(name):
    if name == 'mmwsl':
        return 0
    rooms = [room for room in FLOORS if name == room or name.startswith(f'{room}.')]
    assert rooms, f'{name} has no floor: put its room into FLOORS'
    return FLOORS.index(max(rooms, key=len))


@pytest.mark.parametrize(
    'lower, higher',
    pairwise(
        (
            'mmwsl',
            'mmwsl.functional',
            'mmwsl.compat',
            'mmwsl.registry',
            'mmwsl.utils.files',
            'mmwsl.cache',
            'mmwsl.datasets',
            'mmwsl.models.losses.fused',
            'mmwsl.models.teachers',
            'mmwsl.models',
            'mmwsl.analysis.records',
            'mmwsl.engine.hooks',
        )
    ),
)
def test_floors_are_in_order(lower, higher):
    assert floor(lower) < floor(higher)


def test_no_arrow_to_a_higher_floor():
    assert GRAPH['mmwsl.registry'] == {'mmwsl.compat'}  # arrows are seen
    assert [
        f'{name} -> {target}' for name, targets in GRAPH.items() for target in targets if floor(name) < floor(target)
    ] == []


def test_no_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_nothing_uses_an_old_name():
    assert {name for name, tree in TREES.items() if moved(tree)} == set(MOVED)
    assert [f'{name} -> {target}' for name, targets in GRAPH.items() for target in targets & set(MOVED)] == []


@pytest.mark.parametrize(
    'code, found',
    [
        ('import mmwsl.engine', {'mmwsl.engine'}),
        ('from mmwsl import functional', {'mmwsl.functional'}),
        ('from mmwsl.models.losses import WSLLoss', {'mmwsl.models.losses'}),
        ('def late():\n    from mmwsl.utils import data', {'mmwsl.utils.data'}),
        ('importlib.import_module("mmwsl.engine")', {'mmwsl.engine'}),
        ('def __getattr__(name):\n    """Moved to the engine."""\n    import_module("mmwsl.engine")', set()),
        ('"""Moved to another room."""\nfrom mmwsl.engine import *', set()),
    ],
)
def test_imports_are_seen(code, found):
    assert set(imports(ast.parse(code))) == found


# ---------------------------------------------------------------------------------------------------- torch and alone

ALONE = """
import json, math, sys

stack = ('mmengine', 'mmcv', 'mmpretrain', 'mmrazor', 'torchvision', 'scipy', 'rich', 'filelock', 'timm', 'sklearn')
sys.modules.update(dict.fromkeys(stack))  # None: cannot be imported
import torch
load, classes = torch.load, set(torch.serialization.get_safe_globals())
from mmwsl.functional import wsl_loss

loss = wsl_loss(torch.zeros(1, 2), torch.tensor([[math.log(3), 0]]), torch.tensor([0]), tau=1)
untouched = torch.load is load and set(torch.serialization.get_safe_globals()) == classes
print(json.dumps([loss.item(), untouched, 'mmwsl.compat' in sys.modules]))
"""


def test_the_ground_floor_needs_torch_alone():
    assert set().union(*(foreign(imports(TREES[name])) for name in GROUND)) == {'torch', 'torch.nn'}
    assert set().union(*(GRAPH[name] for name in GROUND)) == {'mmwsl.version'}


def test_the_equations_work_without_the_stack():
    done = subprocess.run([sys.executable, '-c', ALONE], cwd=ROOT, capture_output=True, text=True, check=True)
    loss, untouched, readied = json.loads(done.stdout)
    # L_s = H = ln 2, L_t = ln 4/3: w = 1 - exp(-ln 2 / ln 4/3) = 0.910133, loss = w ln 2
    assert loss == pytest.approx(0.630856, abs=1e-5)
    assert untouched and not readied


# ---------------------------------------------------------------------------------------------------------- patches


def root(node):
    """The name that a chain of attributes and items begins with."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def bound_elsewhere(tree):
    """Names that a module imports from outside the house."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                alias.asname or alias.name.split('.')[0] for alias in node.names if not of_the_house([alias.name])
            )
        elif isinstance(node, ast.ImportFrom) and not of_the_house([node.module]):
            yield from (alias.asname or alias.name for alias in node.names)


def targets(node):
    """What a statement assigns to or deletes."""
    if isinstance(node, (ast.Assign, ast.Delete)):
        yield from (inner for target in node.targets for inner in ast.walk(target))
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        yield node.target


def patches(tree):
    """Code that changes an attribute of what was imported from outside, or the table of modules."""
    names = set(bound_elsewhere(tree))
    for node in ast.walk(tree):
        for target in targets(node):
            if isinstance(getattr(target, 'ctx', None), ast.Load):
                continue
            if (isinstance(target, ast.Attribute) and root(target) in names) or (
                isinstance(target, ast.Subscript) and ast.unparse(target.value) == 'sys.modules'
            ):
                yield ast.unparse(node)
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if (function in ('setattr', 'delattr') and root(node.args[0]) in names) or function in (
                'sys.modules.update',
                'sys.modules.pop',
                'sys.modules.setdefault',
                'sys.modules.clear',
            ):
                yield ast.unparse(node)


def test_only_compat_patches():
    found = {name: lines for name, tree in TREES.items() if (lines := list(patches(tree)))}
    assert set(found) == {'mmwsl.compat'}, found


@pytest.mark.parametrize(
    'code',
    [
        'import torch\ntorch.load = print',
        'import torch\ntorch.nn.Module.forward += 1',
        'import torch.nn as nn\nnn.x, y = 1, 2',
        'from mmengine.runner import Runner\nRunner.train = print',
        'from mmengine.runner import Runner\ndel Runner.train',
        'import torch\ndef f():\n    setattr(torch, "load", print)',
        'import sys\nsys.modules["a"] = None',
        'import sys\ndel sys.modules["a"]',
        'import sys\nsys.modules.pop("a")',
    ],
)
def test_patches_are_seen(code):
    assert len(list(patches(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    'code',
    [
        'import torch\nx = torch.zeros(1)\nx.grad = None',
        'import os\nos.environ["A"] = "1"',
        'from mmwsl.models import WSLLoss\nWSLLoss.tau = 1',
        'import torch\nnets[torch.float] = 1',
        'import torch\ndata[0].to = torch.load',
    ],
)
def test_other_assignments_are_no_patches(code):
    assert list(patches(ast.parse(code))) == []


# -------------------------------------------------------------------------------------------------------- readiness

# The parent has the whole stack imported, by the workarounds that need no mmwsl, but mmengine's loader as it is. Each
# child imports one module and hands mmengine the file.
EACH_ALONE = """
import importlib, importlib.util, json, os, sys
path, harm, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
spec = importlib.util.spec_from_file_location('alone', importlib.util.find_spec('mmwsl').origin.replace(
    '__init__', 'compat'))
compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compat)
compat.make_torchvision_importable()
compat.make_mmrazor_importable()
import torch, mmpretrain.datasets, mmpretrain.models, mmrazor.models, scipy.special
from mmengine.runner import CheckpointLoader, checkpoint, load_checkpoint

def refusal(load):
    try:
        load()
    except Exception as error:
        return type(error).__name__
    return 'loaded'

def try_out(name):
    importlib.import_module(name)
    return [refusal(lambda: CheckpointLoader.load_checkpoint(path, map_location='cpu')),
            refusal(lambda: load_checkpoint(torch.nn.Linear(1, 1), path)), os.path.exists(harm)]

def in_a_child(name):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            said = try_out(name)
        except BaseException as error:
            said = [repr(error)]
        os.write(writer, json.dumps(said).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        said = json.load(stream)
    os.waitpid(child, 0)
    if os.path.exists(harm):
        os.rmdir(harm)
    return said

told = {name: in_a_child(name) for name in names}
print(json.dumps([told, checkpoint.torch is torch, [name for name in sys.modules if name.startswith('mmwsl')]]))
"""


class Harm:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_each_module_alone_refuses_a_file_that_runs_code(tmp_path):
    path, harm = tmp_path / 'harmful.pth', tmp_path / 'harm'
    names = [name for name in TREES if name not in EXTRAS or importlib.util.find_spec(EXTRAS[name])]
    path.write_bytes(pickle.dumps(dict(state_dict={}, extra=Harm(harm)), protocol=2))
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', EACH_ALONE, path, harm, json.dumps(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    told, untouched, imported = json.loads(done.stdout.splitlines()[-1])
    assert untouched and imported == []  # so each child began with a loader as mmengine has it
    refused = ['UnsafeCheckpointError', 'UnsafeCheckpointError', False]
    assert {name for name, said in told.items() if said != refused} == GROUND


def test_rooms_ready_the_stack_before_they_import_of_it():
    for name, tree in TREES.items():
        if name.count('.') != 1 or name in GROUND or name == 'mmwsl.compat' or moved(tree):
            continue
        first = next(
            found for node in tree.body for found in imports(node) if of_the_house([found]) or foreign([found])
        )
        assert first == 'mmwsl.compat', f'{name} imports {first} first'


# -------------------------------------------------------------------------------------------------------- old names


@pytest.mark.parametrize('old, new', MOVED.items())
def test_an_old_module_warns_and_has_the_new_objects(old, new, monkeypatch):
    importlib.import_module(new)
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=rf'{old} has moved to {new}; the old name ends with 0\.3'):
        shim = importlib.import_module(old)
    public = {
        name: value
        for name, value in vars(importlib.import_module(new)).items()
        if not name.startswith('_') and name in getattr(importlib.import_module(new), '__all__', [name])
    }
    assert len(public) > 1
    assert [name for name, value in public.items() if getattr(shim, name) is not value] == []


def test_old_names_of_utils_warn_and_are_the_new_objects():
    from mmwsl import engine, utils

    for name in utils._IN_ENGINE:
        with pytest.warns(FutureWarning, match=rf'mmwsl\.utils\.{name} has moved to mmwsl\.engine\.{name}'):
            assert getattr(utils, name) is getattr(engine, name)
    with pytest.raises(AttributeError, match="module 'mmwsl.utils' has no attribute 'nothing'"):
        _ = utils.nothing


@pytest.mark.parametrize(
    'module, old, new',
    [
        ('mmwsl.analysis', 'share', 'regularization_share'),
        ('mmwsl.analysis', 'held_back', 'lowered_logit_share'),
        ('mmwsl.cache', 'RecordFormat', 'AnswerFormat'),
        ('mmwsl.cache', 'TeacherRecord', 'CachedAnswer'),
        ('mmwsl.datasets', 'Resample', 'BootstrapDataset'),
    ],
)
def test_an_old_name_warns_and_is_the_new_object(module, old, new):
    module = importlib.import_module(module)
    with pytest.warns(
        FutureWarning, match=rf'{old} is now called {module.__name__}\.{new}; the old name ends with 0\.3'
    ):
        assert getattr(module, old) is getattr(module, new)
    assert old not in getattr(module, '__all__', ())
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = module.nothing


def test_configs_may_use_old_names():
    from mmwsl.datasets import BootstrapDataset
    from mmwsl.registry import DATASETS, FUNCTIONS

    with pytest.warns(FutureWarning, match='mmwsl.Resample is now called mmwsl.BootstrapDataset'):
        resample = DATASETS.build(dict(type='mmwsl.Resample', seed=0, dataset=dict(type='mmwsl.Digits', pipeline=[])))
    assert type(resample) is BootstrapDataset and len(resample) == 600
    batch: dict = {}
    with pytest.warns(FutureWarning, match='mmwsl.already_collated is now called mmwsl.identity_collate'):
        assert FUNCTIONS.get('mmwsl.already_collated')(batch) is batch
