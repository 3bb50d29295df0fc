import csv
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DATASETS

from mmwsl.analysis import RECORD, bootstrap, pseudo_values, write_records
from mmwsl.analysis.predict import build_dataloader, build_model
from mmwsl.utils import load_network
from tests.tiny import ROOT, build, distillation, load_tool, network, on_device, save_teacher, tool

bias_variance, cache_errors, regularization_samples = (
    load_tool(f'analysis_tools/{name}') for name in ('bias_variance', 'cache_errors', 'regularization_samples')
)
STUDENT, WSL = ROOT / 'configs/vanilla/digits_student.py', ROOT / 'configs/wsl_digits.py'


def run(module, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, args)])
    module.main()


def rows(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


# ---- bias_variance.py


@pytest.fixture
def trained(monkeypatch):
    """Puts untrained networks in place of training; says which configs it was asked to train."""
    configs = []

    def train(tool, config, work_dir, threads):
        cfg = Config.fromfile(config)
        student = cfg.model.get('architecture', cfg.model)
        work_dir.mkdir(parents=True)
        seed = cfg.randomness.seed + 100 * ('teacher' in cfg.model)
        path = save_teacher(work_dir / 'epoch_10.pth', student, seed=seed)
        (work_dir / 'last_checkpoint').write_text(path)
        if 'teacher' in cfg.model:
            for epoch in (1, 2):
                write_records(members(epoch + cfg.randomness.seed, 10), work_dir, epoch)
        configs.append(cfg)

    monkeypatch.setattr(bias_variance, 'train', train)
    return configs


def members(count, total):
    records = np.zeros(total, RECORD)
    records['index'], records['w'] = range(total), 0.25
    records['b'][:count] = 1
    return records


def test_bias_variance_writes_what_the_predictions_give(tmp_path, monkeypatch, trained, capsys):
    run(bias_variance, monkeypatch, STUDENT, WSL, '--models', 5, '--out', tmp_path)
    values, images = {}, build_dataloader(Config.fromfile(STUDENT), 'val_dataloader').dataset
    for arm in ('digits_student', 'wsl_digits'):
        logs = np.stack([np.load(tmp_path / arm / str(model) / 'log_probs.npy') for model in range(5)])
        target = np.load(tmp_path / arm / '0/target.npy')
        for model in range(5):  # what the k-th run's network says
            network = build_model(Config.fromfile(STUDENT))
            load_network(network, str(tmp_path / arm / f'{model}/run/epoch_10.pth'))
            with torch.no_grad():
                logits = network((images[5]['inputs'][None] - 4.9) / 6.0)[0]
            np.testing.assert_allclose(logs[model, 5], logits.log_softmax(0), rtol=1e-4, atol=1e-5)
        values[arm] = {'error': 100.0 * (logs.argmax(2) != target), **pseudo_values(logs, target)._asdict()}
    found = {(row['arm'], row['quantity']): row for row in json.loads((tmp_path / 'results.json').read_text())}
    assert len(found) == 4 + 6
    for (arm, quantity), row in found.items():
        if quantity in values[arm]:
            assert (row['value'], row['low'], row['high']) == pytest.approx(bootstrap(values[arm][quantity]))
    difference = bootstrap(values['wsl_digits']['bias'] - values['digits_student']['bias'])
    row = found['wsl_digits', 'bias']
    assert (row['difference_value'], row['difference_low'], row['difference_high']) == pytest.approx(difference)
    assert found['wsl_digits', 'share']['value'] == pytest.approx((15 + 25 + 35 + 45 + 55) / 5)
    assert found['wsl_digits', 'weight']['value'] == 0.25
    assert [row['value'] for row in rows(tmp_path / 'results.csv')] == [str(row['value']) for row in found.values()]
    assert (tmp_path / 'bias_variance.png').stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert '[10/10] ' in printed and 'variance (nats)' in printed and '95 % interval' in printed
    assert 'too few' not in printed


def test_picture_has_the_differences_of_each_arm_to_the_first_at_zero(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **kwargs: drawn.append(figure))
    own = dict(quantity='error', value=11.5, low=9.0, high=13.0)
    sure = dict(own, arm='b', difference_value=2.0, difference_low=1.0, difference_high=4.0)
    unsure = dict(own, arm='c', difference_value=-1.0, difference_low=-3.0, difference_high=0.5)
    names = dict(a='KD', b='alone', c='WSL, tau 2')
    bias_variance.draw([dict(own, arm='a'), sure, unsure], tmp_path / 'x.png', names, '10 networks')
    (panel,) = drawn[0].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ['alone', 'WSL, tau 2']
    assert panel.get_title() == 'zero: 11.5' and 'Difference to KD' in drawn[0].get_suptitle()
    points = [container.lines[0] for container in panel.containers]
    assert [(*point.get_xydata()[0], point.get_markerfacecolor()) for point in points] == [
        (2.0, 0.0, 'k'),
        (-1.0, 1.0, 'white'),
    ]
    ends = [container.lines[2][0].get_segments()[0][:, 0].tolist() for container in panel.containers]
    assert ends == [[1.0, 4.0], [-3.0, 0.5]]
    assert any(list(line.get_xdata()) == [0, 0] for line in panel.lines)


def test_every_arm_of_a_kept_campaign_has_a_name_in_words():
    pictures = load_tool('results/bias_variance')
    for path in sorted((ROOT / 'results/bias_variance').glob('*.csv')):
        rows = pictures.read(path)
        assert all(isinstance(row['value'], float) for row in rows)
        names = {pictures.named(row['arm']) for row in rows}
        assert len(names) == len({row['arm'] for row in rows}) and not any('_' in name for name in names)


@pytest.mark.parametrize('models', [2, 4])
def test_few_models_give_no_intervals_nor_bias(tmp_path, monkeypatch, trained, capsys, models):
    run(bias_variance, monkeypatch, STUDENT, WSL, '--models', models, '--out', tmp_path)
    printed = capsys.readouterr().out
    assert '95 %' not in printed
    assert f'{models} networks of each config are too few for intervals, bias and variance: give --models 5' in printed
    found = json.loads((tmp_path / 'results.json').read_text())
    assert [row['quantity'] for row in found] == ['error', 'loss', 'error', 'loss', 'share', 'weight']
    assert {row['low'] for row in found} == {row['high'] for row in found} == {None}
    assert [row['low'] for row in rows(tmp_path / 'results.csv')] == [''] * 6
    logs = np.stack([np.load(tmp_path / f'wsl_digits/{model}/log_probs.npy') for model in range(models)])
    target = np.load(tmp_path / 'wsl_digits/0/target.npy')
    assert found[2]['value'] == pytest.approx(100 * (logs.argmax(2) != target).mean())
    assert found[2]['difference_value'] == pytest.approx(found[2]['value'] - found[0]['value'])


def test_the_same_resample_for_every_config_and_another_for_every_run(tmp_path, monkeypatch, trained):
    run(bias_variance, monkeypatch, STUDENT, WSL, '--models', 2, '--out', tmp_path)
    wrapped = [
        (
            cfg.train_dataloader.dataset.type,
            cfg.train_dataloader.dataset.dataset.type,
            cfg.train_dataloader.dataset.dataset.seed,
            cfg.randomness.seed,
        )
        for cfg in trained
    ]
    assert sorted(wrapped) == [('mmwsl.SeededViews', 'mmwsl.BootstrapDataset', seed, seed) for seed in (0, 0, 1, 1)]
    recorded = ['sample_records' in cfg.default_hooks for cfg in trained]
    assert recorded == ['teacher' in cfg.model for cfg in trained]


def test_resample_lies_inside_of_a_device_dataset(tmp_path):
    (arm,) = bias_variance.make_arms([STUDENT], None, on_device())
    cfg = Config.fromfile(bias_variance.prepare(arm, 0, SimpleNamespace(out=tmp_path, same_data=False)))
    dataset = cfg.train_dataloader.dataset
    assert [dataset.type, dataset.dataset.type, dataset.dataset.dataset.type] == [
        'mmwsl.DeviceDataset',
        'mmwsl.BootstrapDataset',
        'mmwsl.Digits',
    ]


def test_a_folder_with_other_settings_is_found_before_the_first_run(tmp_path, monkeypatch, trained):
    (tmp_path / 'digits_student/1').mkdir(parents=True)
    (tmp_path / 'digits_student/1/config.py').write_text('')
    with pytest.raises(ValueError, match='holds a run with other settings'):
        run(bias_variance, monkeypatch, STUDENT, '--models', 2, '--out', tmp_path)
    assert not trained


def test_same_data_leaves_the_training_set_alone(tmp_path, monkeypatch, trained):
    run(bias_variance, monkeypatch, STUDENT, '--models', 2, '--out', tmp_path, '--same-data')
    assert [cfg.train_dataloader.dataset.dataset.type for cfg in trained] == ['mmwsl.Digits'] * 2


def test_temperatures_are_tried_where_there_are_soft_labels():
    configs = [STUDENT, WSL, ROOT / 'configs/kd_digits.py']
    arms = list(bias_variance.make_arms(configs, [1.0, 4.0], dict(log_level='ERROR')))
    assert [arm.name for arm in arms] == [
        'digits_student',
        'wsl_digits_tau1',
        'wsl_digits_tau4',
        'kd_digits_tau1',
        'kd_digits_tau4',
    ]
    assert [loss.tau for arm in arms for loss in bias_variance.distill_losses(arm.cfg).values()] == [1, 4, 1, 4]
    assert all(arm.cfg.log_level == 'ERROR' for arm in arms)


def test_a_folder_with_other_settings_is_not_mixed_up_with_these(tmp_path, monkeypatch, trained):
    run(bias_variance, monkeypatch, STUDENT, '--models', 2, '--out', tmp_path)
    with pytest.raises(ValueError, match='holds a run with other settings, see config.py there'):
        run(bias_variance, monkeypatch, STUDENT, '--models', 2, '--out', tmp_path, '--same-data')


def test_configs_of_one_name():
    with pytest.raises(ValueError, match='configs should have different names'):
        list(bias_variance.make_arms([WSL, WSL], None, {}))


@pytest.mark.slow
def test_bias_variance_trains_and_does_nothing_twice(tmp_path):
    args = (
        'analysis_tools/bias_variance.py',
        STUDENT,
        '--models',
        2,
        '--out',
        tmp_path,
        '--cfg-options',
        'train_cfg.max_epochs=2',
    )
    first = tool(*args, cwd=ROOT)
    table = (tmp_path / 'results.csv').read_text()
    logs = list(tmp_path.glob('digits_student/*/run/*/*.log'))
    assert len(logs) == 2 and '[2/2] digits_student, run' in first.stdout
    (tmp_path / 'digits_student/1/log_probs.npy').unlink()
    tool(*args, cwd=ROOT)
    assert (tmp_path / 'results.csv').read_text() == table
    assert list(tmp_path.glob('digits_student/*/run/*/*.log')) == logs


# ---- regularization_samples.py


@pytest.fixture
def work_dirs(tmp_path):
    """Two runs, of which the sets are known."""
    folders = []
    for run, sets in enumerate(([{0, 1}, {1, 2, 3}, {3}], [{0}, {0}, {0}])):
        folder = tmp_path / f'run{run}'
        for epoch, chosen in enumerate(sets, 1):
            records = members(0, 10)
            records['b'][list(chosen)] = 1
            records['L_s'], records['L_t'] = np.linspace(1, 0.1, 10), 0.5
            write_records(records, folder, epoch)
        Config.fromfile(WSL).dump(folder / 'wsl_digits.py')
        folders.append(folder)
    return folders


def test_shares_and_flow_of_two_runs(tmp_path, monkeypatch, work_dirs, capsys):
    run(regularization_samples, monkeypatch, *work_dirs, '--out', tmp_path / 'out', '--images', 9)
    shares = rows(tmp_path / 'out/share.csv')
    assert [(row['run'], row['epoch'], float(row['share'])) for row in shares] == [
        ('0', '1', 20),
        ('0', '2', 30),
        ('0', '3', 10),
        ('1', '1', 10),
        ('1', '2', 10),
        ('1', '3', 10),
    ]
    assert {row['tau'] for row in shares} == {'4.0'}
    flows = rows(tmp_path / 'out/flow.csv')
    columns = ('stay', 'enter', 'leave', 'outside', 'kept', 'by_chance')
    assert [[float(row[name]) for name in columns] for row in flows[:2]] == [
        pytest.approx([10, 20, 10, 60, 50, 30]),
        pytest.approx([10, 0, 20, 70, 100 / 3, 10]),
    ]
    assert [(row['runs'], row['low'], row['high']) for row in rows(tmp_path / 'out/summary.csv')] == [('2', '', '')] * 4
    summary = {row['quantity']: float(row['value']) for row in rows(tmp_path / 'out/summary.csv')}
    assert summary == pytest.approx(
        {
            'share in the first epoch': 15,
            'share in the last epoch': 10,
            'held back in the last epoch': 10,
            'change sides in some epoch': 20,
        }
    )
    pictures = {path.name for path in (tmp_path / 'out').glob('*.png')}
    assert pictures == {'share.png', 'flow.png', 'largest_weights.png', 'smallest_weights.png'}
    assert 'share.csv' in capsys.readouterr().out


def test_sheets_show_the_images_of_the_largest_and_of_the_smallest_weights(tmp_path, monkeypatch, work_dirs):
    shown = []
    monkeypatch.setattr(
        regularization_samples,
        'draw_sheet',
        lambda dataset, records, heading, path: shown.append((records['index'].tolist(), path.name)),
    )
    run(regularization_samples, monkeypatch, work_dirs[0], '--images', 3)
    assert shown == [([9, 8, 7], 'smallest_weights.png'), ([0, 1, 2], 'largest_weights.png')]


def test_checkpoints_at_several_temperatures(tmp_path, monkeypatch):
    cfg = Config.fromfile(WSL)
    teacher = save_teacher(tmp_path / 'teacher.pth', cfg.model.teacher)
    files = [save_teacher(tmp_path / f'epoch_{epoch}.pth', cfg.model.architecture, seed=epoch) for epoch in (10, 9)]
    run(
        regularization_samples,
        monkeypatch,
        WSL,
        '--checkpoints',
        *files,
        '--taus',
        1,
        8,
        '--cfg-options',
        f'model.teacher_ckpt={teacher}',
    )
    shares = rows(tmp_path / 'regularization_samples/share.csv')
    assert [(row['tau'], row['epoch'], row['samples']) for row in shares] == [
        ('1.0', '9', '600'),
        ('1.0', '10', '600'),
        ('8.0', '9', '600'),
        ('8.0', '10', '600'),
    ]
    assert (tmp_path / 'regularization_samples/flow.png').exists()


def test_the_innermost_dataset_is_the_one_that_indices_speak_of():
    digits = dict(type='mmwsl.Digits', split='train', pipeline=[dict(type='PackInputs')])
    wrapped = dict(type='mmwsl.SeededViews', dataset=dict(type='mmwsl.BootstrapDataset', seed=0, dataset=digits))
    assert regularization_samples.innermost(wrapped) == [digits]
    joined = dict(type='ConcatDataset', datasets=[wrapped, dict(type='RepeatDataset', times=2, dataset=digits)])
    assert regularization_samples.innermost(dict(type='mmwsl.SeededViews', dataset=joined)) == [digits, digits]


def test_sheets_of_joined_datasets_show_the_images_of_each_part(tmp_path, monkeypatch, work_dirs):
    cfg = Config.fromfile(WSL)
    parts = [
        dict(type='mmwsl.Digits', split='train', indices=4, pipeline=[dict(type='PackInputs')]),
        dict(type='mmwsl.Digits', split='test', indices=6, pipeline=[dict(type='PackInputs')]),
    ]
    cfg.train_dataloader.dataset.dataset = dict(type='ConcatDataset', datasets=parts)
    cfg.dump(work_dirs[0] / 'wsl_digits.py')
    shown = []
    image_of = regularization_samples.image_of
    monkeypatch.setattr(
        regularization_samples, 'image_of', lambda datasets, index: shown.append(image_of(datasets, index)) or shown[-1]
    )
    run(regularization_samples, monkeypatch, work_dirs[0], '--images', 10)
    first, second = (DATASETS.build(part) for part in parts)
    expected = [*(first.get_data_info(i)['img'] for i in range(4)), *(second.get_data_info(i)['img'] for i in range(6))]
    for found, image in zip(shown, expected[::-1] + expected, strict=True):
        np.testing.assert_array_equal(found['img'], image)
    with pytest.raises(ValueError, match='another training set: they have an image 10, and .* has 10 images'):
        image_of([first, second], 10)


def test_images_of_files_are_shown(tmp_path):
    from PIL import Image

    Image.new('RGB', (40, 30), (255, 0, 0)).save(tmp_path / 'red.png')

    class Files:
        metainfo = dict(classes=('cat',))

        def __len__(self):
            return 1

        def get_data_info(self, index):
            return dict(img_path=str(tmp_path / 'red.png'), gt_label=0)

    regularization_samples.draw_sheet([Files()], members(1, 1), 'heading', tmp_path / 'sheet.png')
    pixels = np.asarray(Image.open(tmp_path / 'sheet.png').convert('RGB'))
    assert (pixels == (255, 0, 0)).all(2).sum() > 1000


@pytest.mark.parametrize(
    'call, error, message',
    [
        (lambda: regularization_samples.epoch_of(ROOT / 'last.pth'), ValueError, 'should say its epoch.*got last.pth'),
        (lambda: regularization_samples.config_of(ROOT / 'requirements'), FileNotFoundError, 'it has no config'),
        (
            lambda: regularization_samples.temperature(Config.fromfile(STUDENT)),
            ValueError,
            'give --checkpoints and --taus',
        ),
    ],
)
def test_what_cannot_be_analysed(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize('args', [('a', '--taus', '2'), ('a', 'b', '--checkpoints', 'epoch_1.pth')])
def test_options_that_do_not_go_together(monkeypatch, args):
    with pytest.raises(SystemExit):
        run(regularization_samples, monkeypatch, *args)


# ---- cache_errors.py


@pytest.mark.parametrize('norm_eval', [True, False])
def test_errors_of_each_kind_of_record(tmp_path, monkeypatch, capsys, norm_eval):
    cfg = Config.fromfile(WSL)
    student = save_teacher(tmp_path / 'student.pth', network(2))
    weights = build(network(4)).state_dict()
    weights['head.fc.weight'] *= 1000  # logits of some size
    torch.save(weights, tmp_path / 'teacher.pth')
    cfg.model = distillation(teacher_ckpt=str(tmp_path / 'teacher.pth'), teacher_norm_eval=norm_eval)
    cfg.dump(tmp_path / 'pair.py')
    run(cache_errors, monkeypatch, tmp_path / 'pair.py', '--student', student, '--images', 200, '--top-k', 3)
    table = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    size, loss, weight, largest, alone = (dict((row[0], row[i]) for row in table[2:]) for i in range(1, 6))
    assert size == {
        'all, float32': '53',
        'all, float16': '33',
        'top 3, float32': '32',
        'top 3, float16': '26',
        'all, in other batches': '',
    }
    assert float(loss['all, float32']) < float(loss['top 3, float32'])
    assert max(float(weight[kind]) for kind in size if 'float' in kind) < 1e-6 < float(alone['all, float16'])
    assert (float(largest['all, in other batches']) < 1e-3) is norm_eval
