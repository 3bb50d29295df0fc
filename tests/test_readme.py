import csv
import json
import re
import statistics

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmwsl.cache import AnswerFormat
from mmwsl.engine.kept_runs import KeptRuns
from tests.tiny import ROOT, batch, build, losses

FIGURE = re.compile(r'(?<![\d.,])\d\d\.\d\d(?![\d.])')  # as accuracies are written


def page(name):
    return (ROOT / f'{name}.md').read_text()


def prose(name):
    """A page's text on one line, so that a sentence is found wherever its lines end."""
    return ' '.join(page(name).split())


def block(name, word):
    """The first example in Python on a page that has this word."""
    return next(text for text in re.findall(r'```python\n(.*?)```', page(name), re.DOTALL) if word in text)


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """The example for one's own data, as a config file beside the others', with the data it speaks of."""
    for split in ('train', 'val'):
        for label in range(20):
            folder = tmp_path / f'data/mine/{split}/class{label:02}'
            folder.mkdir(parents=True)
            Image.new('RGB', (40, 30), (label, 0, 0)).save(folder / 'image.png')
    text = block('docs/own_data', 'data/mine')
    (tmp_path / 'own.py').write_text(text.replace("'wsl_r34", f"'{ROOT}/configs/wsl_r34"))
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
    assert model.teacher_ckpt == 'work_dirs/my_r34/epoch_90.pth'


def test_distiller_of_the_example_trains(tmp_path):
    text = block('docs/own_data', 'loss_features')
    (tmp_path / 'features.py').write_text(text.replace("'wsl_r34", f"'{ROOT}/configs/wsl_r34"))
    cfg = Config.fromfile(tmp_path / 'features.py').model
    init_default_scope('mmpretrain')
    # its recorders name layers that these networks have
    model = build({**cfg, 'teacher_ckpt': None, 'data_preprocessor': dict(type='mmpretrain.ClsDataPreprocessor')})
    assert {'distill.loss_wsl', 'distill.loss_features'} < set(losses(model, batch(2, channels=3)))


def benchmark(name):
    return json.loads((ROOT / f'results/benchmarks/{name}.json').read_text())


def test_table_of_the_loss_is_that_of_its_benchmark():
    for row in benchmark('loss')['rows']:
        times, memory = row['milliseconds'], row['memory / logits']
        one_thread = ', one thread' if 'machine' in row else ''  # measured in a run of its own
        cells = [' x '.join(map(str, row['shape'])) + one_thread, f'{times["WSLLoss"]:.2f} ms']
        peers = [peer for peer in ('plain KD', 'WSLD (mmrazor)') if peer in times]
        cells += [f'{times["WSLLoss"] / times[peer]:.2f}' for peer in peers] + [''] * (2 - len(peers))
        cells += [f'{memory[peer]:.1f}' for peer in ('WSLLoss', *peers)] + [''] * (2 - len(peers))
        cells += [f'{times["WSLLoss compiled"] / times["plain KD"]:.2f}' if 'WSLLoss compiled' in times else '']
        assert f'| {" | ".join(cells)} |' in page('docs/speed')


def test_table_of_the_step_is_that_of_its_benchmark():
    times = benchmark('train_step')['milliseconds']
    arms = [
        'bare',
        'vanilla',
        'vanilla, device',
        'wsl, eval',
        'wsl, every option',
        'wsl, batch statistics',
        'cached',
        'mmrazor',
        'mmrazor, channels last',
        'teacher',
    ]
    text = page('docs/speed')
    table = text[text.index('| student alone, bare PyTorch loop') :].split('\n\n')[0].splitlines()
    for arm, row in zip(arms, table, strict=True):
        _, milliseconds, beyond, ratio = (cell.strip() for cell in row.strip('|').split('|'))
        assert milliseconds == f'{times[arm]:.0f}'
        if beyond:
            assert float(beyond) == round((times[arm] - times['vanilla']) / times['teacher'], 2)
        if ratio:
            assert float(ratio) == round(times[arm] / times['mmrazor'], 2)
    with_hook = times['wsl, eval'] / times['mmrazor, channels last']
    assert f'Compared with MMRazor with the hook, WSL in eval mode takes {with_hook:.2f} of the time' in prose(
        'docs/speed'
    )


def test_the_page_tells_of_the_tests_that_a_gpu_ran():
    found = benchmark('gpu_tests')
    text = prose('docs/gpu')
    counts = {kind: len(found[kind]) for kind in ('passed', 'failed', 'skipped')}
    assert f'an {found["card"].removeprefix("NVIDIA ")} passed {counts["passed"]} of the tests for GPUs' in text
    assert found['collected'] - sum(counts.values()) == 11 and 'Eleven did not finish' in text
    assert counts['failed'] == 4 and 'Four failed' in text


def test_python_example_runs():
    import torch

    scope = dict(student=torch.randn(4, 10), teacher=torch.randn(4, 10), target=torch.arange(4))
    exec(block('README', 'wsl_weight'), scope)
    assert scope['loss'] > 0


def test_pages_name_files_and_headings_that_exist():
    for path in [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'), *(ROOT / 'results').glob('*.md')]:
        text = path.read_text().replace('$A/', 'configs/ablations/')
        for named in re.findall(r'(?:tools|configs)/[\w/.-]+\.(?:py|sh)', text):
            assert (ROOT / named).exists(), (path.name, named)
        for target, _, anchor in (link.partition('#') for link in re.findall(r'\]\((?!http)(.*?)\)', text)):
            linked = path.parent / target if target else path
            assert linked.exists(), (path.name, target)
            headings = re.findall('(?m)^#+ (.*)', linked.read_text()) if anchor else []
            assert not anchor or anchor in [re.sub(r'[^\w -]', '', line).lower().replace(' ', '-') for line in headings]


def test_check_of_the_teacher_is_where_the_page_switches_it_off():
    assert 'custom_hooks.1.min_score=0' in page('docs/own_data')
    hooks = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py').custom_hooks
    assert hooks[1].type == 'mmwsl.CheckTeacherHook'


@pytest.mark.parametrize('campaign', ['digits', 'cifar100'])
def test_tables_of_bias_and_variance_are_those_of_the_campaigns(campaign):
    text = page('docs/bias_variance')
    rows = list(csv.DictReader((ROOT / f'results/bias_variance/{campaign}.csv').open()))
    decimals = dict(error=1, loss=2, bias=2, variance=2)
    for arm in {row['arm'] for row in rows}:
        found = {row['quantity']: row for row in rows if row['arm'] == arm}
        prefix, sign = ('difference_', '+') if found['error']['difference_value'] else ('', '')
        cells = []
        for quantity, places in decimals.items():
            value, low, high = (
                f'{float(found[quantity][prefix + name]):{sign}.{places}f}' for name in ('value', 'low', 'high')
            )
            cells.append(f'{value} ({low} to {high})')
        assert f'| {" | ".join(cells)} |' in text, arm


def test_sizes_of_a_cache_are_those_of_its_format():
    text = page('docs/teacher_cache')
    for top_k, dtype in (
        (None, 'float32'),
        (None, 'float16'),
        (5, 'float16'),
        (10, 'float32'),
        (10, 'float16'),
        (25, 'float32'),
        (25, 'float16'),
    ):
        cifar, imagenet = (AnswerFormat(classes, top_k, dtype, (4.0,)).layout.itemsize for classes in (100, 1000))
        assert (
            f'| {f"top {top_k}" if top_k else "all"}, {dtype} | {cifar:,}; {imagenet:,} | '
            f'{cifar * 50_000 * 240 / 1e9:.2f} GB | {imagenet * 1_281_167 * 100 / 1e9:.2f} GB | here |'
        ) in text


@pytest.mark.parametrize('name', ['README', 'docs/results', 'docs/choosing'])
def test_accuracies_in_the_text_are_those_of_a_table_or_a_run(name):
    """Tables are made from results/; what the text repeats of them has to be what they say now."""
    lines = page(name).splitlines() + page('docs/results').splitlines()
    tables = ' '.join(line for line in lines if line.startswith('|'))
    runs = KeptRuns(ROOT / 'results').all()
    known = {*FIGURE.findall(tables), *(f'{run["last"]:.2f}' for run in runs)}
    text = ' '.join(line for line in lines if not line.startswith('|'))
    assert set(FIGURE.findall(text)) <= known


def test_weights_that_the_text_names_were_logged():
    means = []
    for name, log in KeptRuns(ROOT / 'results').curves().items():
        if re.fullmatch(r'wsl_r56_r20_cifar100_8e(_eval)?-seed=\d', name):
            lines = [line for line in log if 'distill.wsl_weight' in line]
            means.append(statistics.mean(line['distill.wsl_weight'] for line in lines if line['epoch'] == 8))
    assert len(means) == 6
    assert f'of the last epoch is {min(means):.2f} to {max(means):.2f}' in prose('docs/results')


def test_table_of_views_is_that_of_its_runs():
    row = re.search(r'\| top-1 on the test set, % \| (.*) \|', page('docs/teacher_cache'))[1]
    runs = [json.loads((ROOT / f'results/views/{views}.json').read_text()) for views in ('1', '4', '16', 'live')]
    assert row == ' | '.join(f'{run["top1"]:.2f}' for run in runs)
