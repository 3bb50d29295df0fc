"""What a wheel brings along for OpenMIM, and what it needs."""

import ast
import re
import subprocess
import sys
from importlib.metadata import Distribution

import pytest
import yaml
from mmengine.config import Config
from packaging.requirements import Requirement

from tests.tiny import ROOT

# What is imported by another name than it is installed by.
DISTRIBUTIONS = {'sklearn': 'scikit-learn', 'mmcv': 'mmcv-lite', 'PIL': 'pillow'}


def test_configs_and_tools_travel_where_mim_looks(tmp_path):
    subprocess.run(
        [sys.executable, '-W', 'ignore', 'setup.py', '--quiet', 'build_py', '--build-lib', str(tmp_path)],
        cwd=ROOT,
        check=True,
    )
    for package in ('mmwsl', '_mmwsl_mim'):  # import's and, before mmwsl-*.dist-info in order, onedl-mim's
        mim = tmp_path / package / '.mim'
        (metafile,) = yaml.safe_load((mim / 'model-index.yml').read_text())['Import']
        for model in yaml.safe_load((mim / metafile).read_text())['Models']:
            assert (mim / model['Config']).exists()
        assert Config.fromfile(mim / 'configs/wsl_digits.py').model.type == 'mmwsl.WSLDistill'
        assert (mim / 'tools/train.py').exists()
    assert (tmp_path / 'mmwsl/py.typed').exists()  # mypy reads our types


@pytest.fixture(scope='module')
def required(tmp_path_factory):
    """Requirements by extra; '' without one."""
    folder = tmp_path_factory.mktemp('metadata')
    subprocess.run(
        [sys.executable, '-W', 'ignore', 'setup.py', '--quiet', 'egg_info', '--egg-base', str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found = {}
    for line in Distribution.at(folder / 'mmwsl.egg-info').requires:
        requirement, _, marker = line.partition(';')
        extra = re.search(r'extra == "([^"]*)"', marker)
        found.setdefault(extra[1] if extra else '', []).append(requirement.strip())
    return found


def names(requirements):
    return {re.match(r'[\w.-]+', requirement).group() for requirement in requirements}


def test_without_an_extra_torch_is_all_that_is_needed(required):
    assert required[''] == ['torch>=2.6']


def test_two_sets_differ_in_who_releases_them(required):
    assert names(required['onedl']) ^ names(required['openmmlab']) == {
        'onedl-mmengine',
        'onedl-mmcv',
        'onedl-mmpretrain',
        'mmengine',
        'mmcv-lite',
        'mmpretrain',
    }


def test_the_tests_have_the_extras_that_they_use(required):
    assert names(required['dev']) > names(required['timm'] + required['demo'])


def imported(tree):
    """Top-level names that a module imports, each with the extra that it says brings it, or ''."""
    extras = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and (extra := re.match(r"from_extra\('(\w+)'\)", ast.unparse(node.items[0]))):
            extras.update(dict.fromkeys(ast.walk(node), extra[1]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split('.')[0], extras.get(node, '')) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split('.')[0], extras.get(node, '')


def test_what_the_package_imports_it_asks_for(required):
    brought = {
        **{extra: names(required[extra]) for extra in ('demo', 'triton', 'onnx', 'timm')},
        '': names(required[''] + required['openmmlab']),
    }
    found = {pair for path in (ROOT / 'mmwsl').rglob('*.py') for pair in imported(ast.parse(path.read_text()))}
    foreign = {(name, extra) for name, extra in found if name not in {'mmwsl', *sys.stdlib_module_names}}
    assert {('torch', ''), ('mmcv', ''), ('sklearn', 'demo')} < foreign
    assert [pair for pair in sorted(foreign) if DISTRIBUTIONS.get(pair[0], pair[0]) not in brought[pair[1]]] == []


def pins(text):
    """Version by name, as pip compares names."""
    return {
        re.sub('[-_.]+', '-', name).lower(): version
        for name, version in re.findall(r'^([\w.-]+)==([^\s;\\]+)', text, re.M)
    }


@pytest.mark.parametrize('name', ['onedl', 'openmmlab', 'onedl-dense', 'openmmlab-dense'])
def test_each_pin_but_torchs_has_its_hashes(name):
    plain, hashed = ((ROOT / f'requirements/{file}.txt').read_text() for file in (name, f'{name}-hashes'))
    expected = pins(plain)
    if 'dense' not in name:
        assert expected.pop('torch') and expected.pop('torchvision') and len(expected) > 50
    assert pins(hashed) == expected
    assert_hashes_alone(hashed)


def test_triton_is_pinned_with_its_hashes_and_asked_for_by_its_extra_alone(required):
    hashed = (ROOT / 'requirements/triton.txt').read_text()
    ((name, version),) = pins(hashed).items()
    (wanted,) = required['triton']
    assert name == Requirement(wanted).name == 'triton' and version in Requirement(wanted).specifier
    assert_hashes_alone(hashed)
    assert [extra for extra in required if 'triton' in names(required[extra])] == ['triton']  # it is a large download
    others = [path for path in (ROOT / 'requirements').iterdir() if path.name != 'triton.txt']
    assert [path.name for path in others if 'triton' in pins(path.read_text())] == []


def test_what_a_cluster_needs_is_pinned_with_its_hashes_next_to_either_set(required):
    hashed = (ROOT / 'requirements/cluster.txt').read_text()
    assert_hashes_alone(hashed)
    added = pins(hashed)
    assert names(required['slurm']) | {'optuna'} <= set(added)
    for name in ('onedl', 'openmmlab'):
        assert added.keys().isdisjoint(pins((ROOT / f'requirements/{name}.txt').read_text()))


def assert_hashes_alone(text):
    """Below a comment, pins with hashes, and neither an option nor an address."""
    entry = r'[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+\n'
    comments, body = re.fullmatch(r'((?:#[^\n]*\n)+)(.*)', text, re.S).groups()
    assert re.fullmatch(f'({entry})+', body) and '://' not in comments


# -------------------------------------------------------------------------------------------------------- for joiners


def test_the_page_on_installing_names_each_extra(required):
    install = (ROOT / 'docs/install.md').read_text()
    named = {name for row in re.findall(r'(?m)^\| (`.*?) \|', install) for name in re.findall('`(.*?)`', row)}
    assert set(required) - {''} == named


def test_public_ci_runs_what_the_makefile_has(required):
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    targets = set(re.findall(r'(?m)^([a-z-]+):', (ROOT / 'Makefile').read_text()))
    steps = [step.get('run', '') for job in workflow['jobs'].values() for step in job['steps']]
    assert (
        {'lint', 'install', 'test', 'docs'}
        <= {found[1] for step in steps if (found := re.match('make ([a-z-]+)', step))}
        <= targets
    )
    rows = workflow['jobs']['test']['strategy']['matrix']['include']
    assert {row['stack'] for row in rows} == {'onedl', 'openmmlab'}
    (oldest,) = (row['packages'].split()[0] for row in rows if row['torch'] == 'oldest')
    assert Requirement(required[''][0]).specifier.contains(oldest.removeprefix('torch=='))
    assert oldest.startswith(required[''][0].replace('>=', '=='))


def test_pre_commit_has_the_ruff_that_is_pinned():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (ruff,) = (repo['rev'] for repo in hooks if 'ruff' in repo['repo'])
    for name in ('onedl', 'openmmlab'):
        assert f'ruff=={ruff.removeprefix("v")}' in (ROOT / f'requirements/{name}.txt').read_text()
