import sys

import pytest

from tests.tiny import ROOT, load_tool


@pytest.fixture(scope='module')
def choosing():
    sys.path.insert(0, str(ROOT / 'tools/results'))  # it imports a tool beside it
    yield load_tool('results/choosing')
    sys.path.remove(str(ROOT / 'tools/results'))


def run(config, seed, top1, options=(), **settings):
    return dict(config=config, seed=seed, last=top1, options=list(options), settings=settings)


def test_pages_are_what_the_results_give(choosing):
    for path, text in choosing.pages(choosing.Runs(choosing.read_runs())).items():
        assert path.read_text() == text, 'out of step: run tools/results/choosing.py'
    assert choosing.PAGE.read_text().count('written by tools/results/choosing.py') == 11
    assert '| 58.22 ± 0.73 | 3 |' in choosing.README.read_text()  # WSL in 8 epochs: 57.39, 58.55, 58.73


def test_every_config_that_is_asked_for_exists(choosing):
    stems = {path.stem for path in (ROOT / 'configs').rglob('*.py')}
    for data in choosing.DATA:
        assert data.grid in stems
        for pair, suffix in ((data.pair, ''), (data.weak_pair, ''), (data.pair, '_noise')):
            assert set(data.configs(pair, suffix).values()) <= stems


def test_every_method_that_is_asked_for_has_a_config(choosing):
    stems = {path.stem for path in (ROOT / 'configs').rglob('*.py')}
    questions = sys.modules['questions']
    methods = [
        *questions.STEP,
        *questions.LOSSES,
        *questions.TEACHER_LOSS,
        *questions.WRONG,
        *(questions.Method('', config) for pair in questions.WEIGHT.values() for config in pair),
    ]
    assert {method.name(pair) for method in methods for pair in (questions.DIGITS, questions.CIFAR)} <= stems


def test_gaps_are_paired_on_one_kind_of_machine_alone(choosing):
    """2, 3 and 7 ahead in pairs: 4 on average, with a standard error of sqrt(7 / 3)."""
    questions = sys.modules['questions']

    def runs(*top1, gpu=None):
        return {seed: dict(last=value, best=value, machine=dict(gpu=gpu)) for seed, value in enumerate(top1)}

    assert questions.gap(runs(12.0, 23.0, 37.0), runs(10.0, 20.0, 30.0)) == '+4.00 ± 1.53'
    # variances of 157 and 100
    assert questions.gap(runs(12.0, 23.0, 37.0, gpu='H200'), runs(10.0, 20.0, 30.0)) == '+4.00 ± 9.26, unpaired'
    assert questions.gap(runs(1.0), runs(2.0, 3.0)) == ''
    assert questions.last_and_best({0: dict(last=1.0, best=2.0), 1: dict(last=3.0, best=3.0)}) == (
        '2.00 ± 1.41 (best 2.50; 2)'
    )


def test_grid_holds_runs_of_that_setting_and_no_others(choosing):
    tau, weight = f'{choosing.LOSS}.tau', f'{choosing.LOSS}.loss_weight'
    runs = choosing.Runs(
        [
            run('wsl_digits', 0, 90.0, **{tau: '2', weight: '1'}),
            run('wsl_digits', 1, 92.0, **{weight: '1', tau: '2'}),
            run('wsl_digits', 2, 10.0, ['train_cfg.max_epochs=1'], **{tau: '2', weight: '1'}),
            run(
                'wsl_digits',
                0,
                80.0,
                ['model.teacher_ckpt=t.pth', 'train_cfg.val_interval=8'],
                **{tau: '8', weight: '4'},
            ),
            run('wsl_digits', 3, 20.0),
        ]
    )
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in choosing.grid_table(runs).splitlines()]
    assert rows[0] == [
        'Data',
        '`tau`',
        *(f'`loss_weight` {weight}' for weight in ('0.5', '1', '2.25', '4')),
        'Mean',
        'Runs',
    ]
    filled = {
        (row[0], row[1], place): cell
        for row in rows[2:]
        for place, cell in enumerate(row[2:-2])
        if cell != choosing.EMPTY
    }
    assert {row[-2] for row in rows[2:]} == {''}
    assert [row[-1] for row in rows[3:6]] == ['0, 2, 0, 0', '0, 0, 0, 0', '0, 0, 0, 1']
    assert filled == {('Digits', '2', 1): '91.00 ± 1.41', ('Digits', '8', 3): '80.00'}


def test_a_row_of_the_grid_has_the_mean_of_its_cells(choosing):
    runs = choosing.Runs(
        [
            run(
                'wsl_digits', seed, top1 + seed, **{f'{choosing.LOSS}.tau': '2', f'{choosing.LOSS}.loss_weight': weight}
            )
            for weight, top1 in (('0.5', 80.0), ('1', 90.0), ('2.25', 91.0), ('4', 92.5))
            for seed in ((0, 2) if weight == '1' else (0,))
        ]
    )
    row = next(line for line in choosing.grid_table(runs).splitlines() if '| Digits | 2 |' in line)
    assert row.endswith('| 92.50 | 88.62 | 1, 2, 1, 1 |')  # of 80, 91, 91 and 92.5


def test_runs_on_a_subset_stand_apart(choosing):
    digits, cifar = choosing.DATA
    runs = choosing.Runs(
        [
            run('r20_cifar100_8e', 0, 60.0),
            run('r20_cifar100_8e', 0, 30.0, **dict(cifar.settings)),
            run('r20_cifar100_8e_noise', 0, 20.0, **dict(cifar.settings), **{choosing.NOISE: '0.4'}),
        ]
    )
    cells = choosing.noisy(runs, cifar)
    assert {prob: [run['last'] for run in arms['alone'].values()] for prob, arms in cells.items()} == {
        '0': [30.0],
        '0.2': [],
        '0.4': [20.0],
    }
    assert not any(seeds for arms in choosing.noisy(runs, digits).values() for seeds in arms.values())


def test_difference_is_taken_in_pairs(choosing):
    first = {0: dict(last=5.0), 1: dict(last=7.0), 2: dict(last=6.0), 9: dict(last=100.0)}
    second = {2: dict(last=5.0), 1: dict(last=4.0), 0: dict(last=3.0)}
    # 2, 3, 1: mean 2, standard deviation 1, over root 3
    assert choosing.difference(first, second) == '+2.00 ± 0.58'
    assert choosing.difference(first, {1: dict(last=7.5)}) == '-0.50'
    assert choosing.difference(first, {1: dict(last=7.5), 2: dict(last=7.0)}) == '-0.75'  # two tell no error
    assert choosing.difference(first, {}) == ''


def test_weights_at_random_stand_against_plain_labels_of_the_same_seed(choosing):
    config, settings = choosing.DATA[1].configs('r56_r20_cifar100_8e', '_noise'), dict(choosing.DATA[1].settings)
    settings[choosing.NOISE] = '0.4'
    made = choosing.random_table(
        choosing.Runs(
            [
                run(config['kd'], 1, 30.0, **settings),
                run(config['wsl'], 1, 20.0, **settings),
                run(config['wsl'], 0, 11.0, **settings, **{f'{choosing.LOSS}.weighting': 'random'}),
                run(config['wsl'], 1, 27.5, **settings, **{f'{choosing.LOSS}.weighting': 'random'}),
            ]
        )
    )
    assert [line.split(' | ')[1:] for line in made.splitlines()[2:]] == [
        ['30.00', '', '30.00 |'],
        ['20.00', '-10.00', '20.00 |'],
        ['19.25 ± 11.67', '-2.50', '11.00, 27.50 |'],
    ]


def test_scales_stand_against_the_lowest_of_the_same_seed(choosing):
    weight, subset = 'model.distiller.distill_losses.loss_kd.loss_weight', choosing.DATA[1].settings
    kd, fields = 'kd_r56_r20_cifar100_8e', 'kd-hinton_r56_r20_cifar100_8e'
    found = [(kd, '0.9', 0, 20.0), (kd, '0.9', 1, 24.0), (kd, '9', 0, 23.0), (kd, '9', 1, 25.0), (fields, '9', 0, 22.5)]
    made = choosing.scale_table(
        choosing.Runs(
            [
                *(run(config, seed, top1, **dict(subset), **{weight: alpha}) for config, alpha, seed, top1 in found),
                run(kd, 0, 60.0, **{weight: '2.25'}),
            ]
        )
    )  # of all images
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in made.splitlines()[2:]]
    assert [row for row in rows if row[1] != '4.5'] == [
        ['1', '0.9', '22.00 ± 2.83', '', '20.00, 24.00'],
        ['1', '2.25', 'not run yet', '', ''],
        ['1', '9', '24.00 ± 1.41', '+2.00', '23.00, 25.00'],
        ['0.1', '0.9', 'not run yet', '', ''],
        ['0.1', '9', '22.50', '+2.50', '22.50'],
    ]


def test_pictures_show_what_is_complete(choosing, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, 'PICTURES', tmp_path)
    choosing.draw(choosing.Runs([]))
    assert not list(tmp_path.iterdir())
    digits = choosing.DATA[0]
    runs = [
        run(config, seed, 90.0 + seed, **({choosing.NOISE: prob} if suffix else {}))
        for seed in (0, 1)
        for prob, suffix in (('0', ''), ('0.2', '_noise'), ('0.4', '_noise'))
        for config in digits.configs(digits.pair, suffix).values()
    ]
    choosing.draw(choosing.Runs(runs))
    assert [path.name for path in tmp_path.iterdir()] == ['choosing_noise.png']
    choosing.draw(choosing.Runs([run('kd_r56_r20_cifar100_8e', 0, 58.0), run('dkd_r56_r20_cifar100_8e', 0, 59.0)]))
    assert (tmp_path / 'choosing_methods.png').exists()


def test_longer_runs_are_told_apart_from_those_in_float32(choosing):
    settings = {'train_cfg.max_epochs': '40', 'param_scheduler.milestones': '[25,30,35]'}
    options = ['optim_wrapper.type=AmpOptimWrapper', 'train_cfg.val_interval=4', 'optim_wrapper.dtype=bfloat16']
    runs = choosing.Runs(
        [
            run('kd_r56_r20_cifar100', 0, 60.0, options, **settings),
            run('kd_r56_r20_cifar100', 1, 62.0, options, **settings),
            run('kd_r56_r20_cifar100', 2, 61.0, options, **settings),
            run('wsl_r56_r20_cifar100', 0, 61.0, options, **settings),
            run('wsl_r56_r20_cifar100', 1, 65.0, options, **settings),
            run('wsl_r56_r20_cifar100', 2, 63.0, options, **settings),
            run('wsl_r56_r20_cifar100', 2, 10.0, [], **settings),
            run('r20_cifar100', 0, 10.0, options),
        ]
    )
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in choosing.longer_table(runs).splitlines()]
    assert rows[2][:2] == ['Alone', choosing.EMPTY]
    assert rows[4:] == [
        ['Plain soft labels', '61.00 ± 1.00', '', '60.00, 62.00, 61.00'],
        ['Weighted soft labels', '63.00 ± 2.00', '+2.00 ± 0.58', '61.00, 65.00, 63.00'],
    ]
