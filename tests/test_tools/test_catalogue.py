import hashlib
import re

import pytest
import yaml
from mmengine.config import Config

from mmwsl.engine import launcher_parser
from mmwsl.engine.kept_runs import KeptRuns
from mmwsl.utils.text import marks
from tests.tiny import ROOT, load_tool

catalogue = load_tool('results/catalogue')

STEMS = {
    path.stem
    for path in (ROOT / 'configs').rglob('*.py')
    if not {'_base_', *catalogue.OTHER_TASKS} & set(path.relative_to(ROOT / 'configs').parts)
}


def test_files_are_what_the_configs_and_the_results_give():
    for path, text in catalogue.catalogue().items():
        assert path.read_text() == text, f'{path} is out of step: run tools/results/catalogue.py'


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


def test_each_method_is_listed_under_its_heading_and_its_paper():
    sections = {
        title: re.findall(r'^\| \[(\S+)\]', text, re.M)
        for title, text in re.findall(
            r'^## ([^\n]*)\n(.*?)(?=^## |\Z)', (ROOT / 'configs/README.md').read_text(), re.M | re.S
        )
    }
    assert sections['ImageNet-1k: other methods'] == [
        f'{method}_r34_r18_in1k' for method in ('kd-ls', 'dkd', 'nkd', 'dist', 'wttm')
    ]
    assert sections["Digits: other methods with WSL's weights"] == [
        f'wsl-{method}_digits' for method in ('hinton', 'dkd', 'nkd', 'dist')
    ]
    assert sections["ImageNet-1k: plain soft labels, Hinton's recipe"] == [
        'kd-hinton_r34_r18_in1k',
        'kd-hinton_r50_mbv1_in1k',
    ]
    content = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text())
    papers = {entry['Name']: entry['Paper']['URL'].rsplit('/')[-1] for entry in content['Collections']}
    assert (papers['DKD'], papers['WTTM'], papers['DKD, weighted']) == ('2203.08679', '2402.11148', '2102.00650')


def test_published_figures_of_kd_stand_with_their_recipe_alone():
    numbers = yaml.safe_load((ROOT / 'configs/published.yml').read_text())
    names = [name for theirs in numbers.values() for name in theirs]
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith('kd_')], 'kd_ has the weight of wsl_, and nobody else has it'
    assert catalogue.published('kd-hinton_r56_r20_cifar100', numbers) == (70.66, "RepDistiller's README")


def row(name, numbers=None, results=None):
    entry = catalogue.read_entry(next((ROOT / 'configs').rglob(f'{name}.py')))
    return dict(zip(catalogue.COLUMNS, catalogue.row(entry, numbers or {}, results or {})))


def test_what_was_not_measured_has_an_empty_cell():
    cells = row('wsl_r110_r32_cifar100', numbers={'a paper': {'wsl_r110_r32_cifar100': 74.1}})
    assert (cells['Published'], cells['Source'], cells['Measured'], cells['Runs']) == ('74.10', 'a paper', '', '')
    cells = row('wsl_r110_r32_cifar100', results={'wsl_r110_r32_cifar100': [dict(last=73.2)]})
    assert (cells['Published'], cells['Source'], cells['Measured'], cells['Runs']) == ('', '', '73.20', '1')


def test_several_runs_have_mean_and_sample_standard_deviation():
    # 70, 71, 73: mean 71.333, deviations -1.333, -0.333, 1.667, squares 4.667 / 2, root 1.528
    assert catalogue.mean_and_spread([dict(last=70.0), dict(last=71.0), dict(last=73.0)]) == '71.33 ± 1.53'


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results to which runs are added."""
    monkeypatch.setattr(catalogue, 'RESULTS', tmp_path)

    def add(config, seed, top1, settings=None, options=()):
        KeptRuns(tmp_path).keep(
            dict(
                name=f'{config}-{seed}', config=config, seed=seed, last=top1, settings=settings or {}, options=options
            ),
            [],
            '',
        )

    return add


def test_results_are_runs_of_the_config_as_it_is_in_order_of_seeds(results):
    results('a', 10, 1.0), results('a', 2, 3.0), results('a', 3, 9.0, settings={'tau': '8'}), results('b', 0, 5.0)
    found = catalogue.read_results()
    assert {config: [run['last'] for run in runs] for config, runs in found.items()} == {'a': [3.0, 1.0], 'b': [5.0]}


def test_a_run_of_another_recipe_is_no_result_of_the_config(results):
    results('a', 0, 1.0, options=['model.teacher_ckpt=t.pth', 'train_dataloader.num_workers=0'])
    results('a', 1, 9.0, options=['train_cfg.max_epochs=1'])
    results('b', 0, 9.0, options=['model.teacher_ckpt=t.pth', 'model.teacher_norm_eval=True'])
    assert {config: [run['last'] for run in runs] for config, runs in catalogue.read_results().items()} == {'a': [1.0]}


def test_result_without_its_log_is_an_error(results):
    results('a', 0, 1.0)
    (catalogue.RESULTS / 'curves.jsonl').unlink()
    with pytest.raises(ValueError, match=r'curves.jsonl has no log of a-0'):
        catalogue.read_results()


def test_figures_kept_are_those_of_their_logs():
    kept = KeptRuns(ROOT / 'results')
    curves, texts = kept.curves(), kept.configs()
    configs = {sha256: Config.fromstring(text, '.py') for sha256, text in texts.items()}
    assert {sha256: hashlib.sha256(text.encode()).hexdigest()[:12] for sha256, text in texts.items()} == {
        sha256: sha256 for sha256 in texts
    } and {run['config_sha256'] for run in kept.all()} == texts.keys()
    for run in kept.all():
        cfg = configs[run['config_sha256']]
        cfg.randomness.seed = run['seed']
        figures = [None] * cfg.train_cfg.max_epochs  # if a kill hit the validation of an epoch, it was not repeated
        for line in (line for line in curves[run['name']] if run['metric'] in line):
            factor = 100 if run['metric'] == 'coco/bbox_mAP' else 1
            figures[line['step'] - 1] = round(factor * line[run['metric']], 4)
        assert figures == run['of_each_epoch'] and run['last'] == figures[-1] is not None, run['name']
        assert run['best'] == max(filter(None, figures)) == figures[run['best_epoch'] - 1]
        assert as_it_says(cfg, run).to_dict() == cfg.to_dict(), f'{run["name"]} names other settings than its config'


def as_it_says(cfg, run):
    """A run's config with what the result says was set in it."""
    settings = [f'{key}={value}' for key, value in {**run['settings'], 'randomness.seed': run['seed']}.items()]
    args = launcher_parser('').parse_args(['config', '--cfg-options', *settings, *run['options']])
    merged = cfg.copy()
    merged.merge_from_dict(args.cfg_options)
    return merged


@pytest.mark.parametrize(
    'name, teacher, student, recipe',
    [
        ('wsl_wrn40-2_sv1_cifar100', 'WRN-40-2', 'ShuffleNetV1', 'SGD, lr 0.01, 240 epochs, batch 64'),
        ('kd_r34_r18_in1k', 'ResNet-34', 'ResNet-18', 'SGD, lr 0.1, 100 epochs, batch 256'),
        ('wsl_r56-r44-r32_r20_cifar100', 'ResNet-56 + 44 + 32', 'ResNet-20', 'SGD, lr 0.05, 240 epochs, batch 64'),
        ('wsl_digits', 'ResNet-14', 'ResNet-8, 2 channels', 'SGD, lr 0.1, 10 epochs, batch 50'),
        ('vgg8_cifar100', '', 'VGG-8', 'SGD, lr 0.05, 240 epochs, batch 64'),
        ('r20_cifar100_8e', '', 'ResNet-20', 'SGD, lr 0.1, 8 epochs, batch 128'),
        ('kd_r56_r20_cifar100_8e_eval', 'ResNet-56', 'ResNet-20', 'SGD, lr 0.1, 8 epochs, batch 128'),
        ('mmrazor_r56_r20_cifar100_8e', 'ResNet-56', 'ResNet-20', 'SGD, lr 0.1, 8 epochs, batch 128'),
        ('kd-hinton_wrn40-2_sv1_cifar100', 'WRN-40-2', 'ShuffleNetV1', 'SGD, lr 0.01, 240 epochs, batch 64'),
        ('wsl-dkd_digits', 'ResNet-14', 'ResNet-8, 2 channels', 'SGD, lr 0.1, 10 epochs, batch 50'),
    ],
)
def test_row_says_who_teaches_whom_and_how(name, teacher, student, recipe):
    cells = row(name)
    assert (cells['Teacher'], cells['Student'], cells['Recipe']) == (teacher, student, recipe)


def test_names_in_the_catalogue_are_those_of_the_networks():
    """A short name and the network that the config builds cannot drift apart."""
    for stem in sorted(stem for stem in STEMS if re.fullmatch(r'r\d+_cifar100|wrn.*|vgg\d+_cifar100', stem)):
        depth = Config.fromfile(ROOT / f'configs/vanilla/{stem}.py').model.backbone.depth
        assert re.search(r'\d+', stem)[0] == str(depth)


def test_number_for_a_config_that_does_not_exist_is_an_error(results):
    results('wsl_x_y', 0, 1.0)
    with pytest.raises(ValueError, match=r"do not exist: \['wsl_x_y'\]"):
        catalogue.catalogue()


def test_pages_of_results_show_every_run_that_is_kept():
    text = catalogue.PAGE.read_text()
    begin, end = marks('results', 'results/catalogue')
    table, dense = text[text.index(begin) : text.index(end)], (ROOT / 'docs/dense.md').read_text()
    of_pixels = {config: label for configs in catalogue.DENSE.values() for config, label in configs.items()}
    for config, runs in catalogue.read_results().items():
        each = ', '.join(f'{run["last"]:.2f}' for run in runs)
        if config in of_pixels:
            assert re.search(rf'^\| {re.escape(of_pixels[config])} \| .* \| {each} \|$', dense, re.M)
        else:
            assert f'| `{config}` |' in table and each in table
