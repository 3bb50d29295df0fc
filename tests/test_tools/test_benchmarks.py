"""tools/benchmarks without its clocks: who takes part, and what is made of the times."""

import argparse
import contextlib
import json
import sys

import pytest
import torch

from mmwsl.models import losses
from tests.tiny import ROOT, load_tool

LOSS = """from mmwsl.models.losses import functional
from mmwsl.registry import MODELS


@MODELS.register_module()
class WSLLoss:

    def __init__(self, tau):
        self.tau = tau

    def __call__(self, preds_S, preds_T, target):
        return functional.scaled(preds_S.sum(), self.tau)
"""


@pytest.fixture
def checkout(tmp_path):
    """A tree as that of 0.1.0, with a loss of its own: tau times the sum of the student's logits."""
    files = {
        '__init__': 'raise ImportError',
        'registry': 'raise ImportError',
        'models/__init__': 'raise ImportError',
        'models/losses/__init__': 'from mmwsl.models.losses.wsl_loss import WSLLoss',
        'models/losses/functional': 'def scaled(value, tau): return tau * value',
        'models/losses/wsl_loss': LOSS,
        'version': "__version__ = '0.0.9'",
    }
    for name, text in files.items():
        path = tmp_path / f'mmwsl/{name}.py'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def loss_tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/benchmarks')
    return load_tool('benchmarks/loss')


def settings(**changed):
    names = ['WSLLoss', 'plain KD', 'WSLD (mmrazor)']
    usual = dict(device='cpu', contestants=names, baseline=None, rounds=2, seconds=0, processes=1)
    return argparse.Namespace(**{**usual, **changed})


def ours():
    return {name: module for name, module in sys.modules.items() if name.startswith('mmwsl')}


def test_another_version_is_loaded_beside_this_one(loss_tool, checkout):
    before = ours()
    version, loss = loss_tool.loss_of(checkout)
    assert version == '0.0.9'
    assert loss(tau=3.0)(torch.tensor([[1.0, 3.0]]), None, None) == 12.0
    assert ours() == before and sys.modules['mmwsl.models.losses'] is losses


def test_a_version_that_fails_to_load_leaves_this_one_in_place(loss_tool, checkout):
    (checkout / 'mmwsl/models/losses/functional.py').write_text('raise ImportError("its own fault")')
    before = ours()
    with pytest.raises(ImportError, match='its own fault'):
        loss_tool.loss_of(checkout)
    assert ours() == before


def test_a_baseline_that_is_no_checkout_is_refused(loss_tool, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'tree of mmwsl, got .*\. Make one with git worktree add'):
        loss_tool.loss_of(tmp_path)


@pytest.mark.parametrize('shape', [(4, 5), (2, 5, 3)], ids=str)
def test_every_contestant_steps_once_a_round(loss_tool, checkout, shape):
    times, memory, first = loss_tool.measure(shape, 'float32', settings(baseline=checkout))
    assert list(times) == list(memory) == list(first) == ['WSLLoss', 'plain KD', 'WSLD (mmrazor)', 'WSLLoss 0.0.9']
    assert all(len(values) == 2 for values in times.values())


def test_a_peer_without_dense_logits_is_given_each_pixel_as_a_sample(loss_tool):
    preds_S, preds_T, target = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    loss = loss_tool.CONTESTANTS['WSLD (mmrazor)'](preds_S.shape)
    values = [
        [
            loss(preds_S[n, :, i, j][None], preds_T[n, :, i, j][None], target[n, i, j][None])
            for i in range(3)
            for j in range(4)
        ]
        for n in range(2)
    ]
    torch.testing.assert_close(loss(preds_S, preds_T, target), torch.tensor(values).mean())


def test_rounds_go_on_for_the_seconds_asked_for(loss_tool, monkeypatch):
    clock = iter([9.0] * 6 + [0.25] * 10)  # warming up, two contestants and three rounds, is not counted
    monkeypatch.setattr(loss_tool, 'seconds', lambda *_: next(clock))
    times, _, first = loss_tool.measure((4, 5), 'float32', settings(contestants=['WSLLoss', 'plain KD'], seconds=1.0))
    assert times == {'WSLLoss': [0.25] * 4, 'plain KD': [0.25] * 4}
    assert first == {'WSLLoss': 9.0, 'plain KD': 9.0}


def test_the_share_is_of_what_has_to_move(loss_tool, monkeypatch):
    # 4 x 5 logits of 4 bytes, two read and one written: 240 bytes in 2 s, where a copy moves 1,200 bytes a second
    monkeypatch.setattr(loss_tool, 'ProcessPoolExecutor', lambda *_, **__: contextlib.nullcontext(Pool()))
    row = loss_tool.measured_row((4, 5), 'float32', settings(), 1200.0)
    assert row['share of copy bandwidth'] == {'WSLLoss': 0.1}
    assert row['seconds of the first step'] == {'WSLLoss': 7.0}


class Pool:
    """Of processes, with what they would measure."""

    def submit(self, *_):
        return self

    def result(self):
        return {'WSLLoss': [2.0, 2.0, 3.0]}, {'WSLLoss': 3.0}, {'WSLLoss': 7.0}


def test_the_bandwidth_counts_what_is_read_and_written(loss_tool, monkeypatch):
    clock = iter(range(100))  # a copy takes a second
    monkeypatch.setattr(loss_tool, 'COPIED', 400)
    monkeypatch.setattr(loss_tool.time, 'perf_counter', lambda: next(clock))
    assert loss_tool.copy_bandwidth('cpu') == 800


def test_what_torch_compiles_joins_after_a_first_look_at_all_rows(loss_tool, monkeypatch, tmp_path):
    def row(shape, dtype, args, bandwidth):
        on_disk.append(json.loads((tmp_path / 'loss.json').read_text())['rows'] if on_disk else [])
        return {'shape': list(shape), 'milliseconds': dict.fromkeys(args.contestants, 1.0)}

    on_disk = []
    for name, stub in (
        ('measured_row', row),
        ('print_row', lambda row: None),
        ('draw', lambda *args: None),
        ('copy_bandwidth', lambda device: 1.0),
    ):
        monkeypatch.setattr(loss_tool, name, stub)
    monkeypatch.setattr(
        'sys.argv',
        [
            'loss.py',
            '--device',
            'cpu',
            '--processes',
            '0',
            '--out',
            str(tmp_path),
            '--shapes',
            '2x3',
            '4x3',
            '--contestants',
            'WSLLoss',
            'WSLLoss compiled',
        ],
    )
    loss_tool.main()
    on_disk.append(json.loads((tmp_path / 'loss.json').read_text())['rows'])
    assert [[(row['shape'][0], len(row['milliseconds'])) for row in rows] for rows in on_disk] == [
        [],
        [(2, 1)],
        [(2, 1), (4, 1)],
        [(2, 2), (4, 1)],
        [(2, 2), (4, 2)],
    ]


@pytest.mark.parametrize(('device', 'takes_part'), [('cpu', False), ('cuda', True)])
def test_the_kernel_takes_part_on_a_gpu(loss_tool, monkeypatch, device, takes_part):
    monkeypatch.setattr('sys.argv', ['loss.py', '--device', device])
    assert (loss_tool.KERNEL in loss_tool.parse_args().contestants) == takes_part


def test_ratios_are_of_steps_in_the_same_round(loss_tool, capsys):
    # 2, 1 and 3; the medians alone would give 4 / 3
    assert loss_tool.paired_ratio([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == 2.0
    loss_tool.print_row(
        {
            'shape': [64, 100],
            'dtype': 'float32',
            'memory / logits': {'WSLLoss': 3.1, 'old': 3.0},
            'share of copy bandwidth': {'WSLLoss': 0.25, 'old': 0.5},
            'milliseconds': {'WSLLoss': 0.4, 'old': 0.39},
            'WSLLoss / other': {'old': [1.0, 1.2, 0.9]},
        }
    )
    printed = [' '.join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        '64 x 100, float32 ms of copying memory / logits WSLLoss / other',
        'WSLLoss 0.400 0.250 3.10',
        'old 0.390 0.500 3.00 1.000 (0.900 to 1.200)',
    ]


# ---- a training step


@pytest.fixture(scope='session')  # what it registers can be registered once
def train_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / 'tools/benchmarks')
        return load_tool('benchmarks/train_step')


def taking_turns(train_step, monkeypatch, fails_at, seconds=60.0, built_fails=False, steps=4):
    """Arms that do nothing; 'bad' fails at a step. Returns their turns, who stepped, and the rounds that were told."""
    stepped, rounds = [], []

    def build(arm, turns):
        if built_fails and arm == 'bad':
            raise ImportError('no timm here')

        def run():
            for step in range(steps):
                turns.wait(arm)
                if arm == 'bad' and step == fails_at:
                    raise ValueError('three\nlines\nof it')
                stepped.append((step, arm))
                turns.done(arm)

        return run

    monkeypatch.setattr(train_step, 'built', build)
    turns = train_step.measure(['a', 'b', 'bad'], seconds, lambda times: rounds.append(len(times['a'])))
    return turns, stepped, rounds


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('fails_at', [0, 2, 9])
def test_an_arm_that_fails_is_left_out_and_the_others_go_on(train_step, monkeypatch, fails_at, capsys):
    turns, stepped, rounds = taking_turns(train_step, monkeypatch, fails_at)
    assert {arm: len(times) for arm, times in turns.times.items()} == {'a': 4, 'b': 4, 'bad': min(fails_at, 4)}
    assert turns.missing == ({} if fails_at == 9 else {'bad': 'ValueError: three'})
    assert [step for step, _ in stepped] == sorted(step for step, _ in stepped)  # nobody is ahead of a round
    assert rounds[:4] == [0, 1, 2, 3]


def test_an_arm_that_cannot_be_built_is_left_out_with_the_reason(train_step, monkeypatch):
    turns, stepped, _ = taking_turns(train_step, monkeypatch, 0, built_fails=True)
    assert turns.missing == {'bad': 'ImportError: no timm here'} and len(stepped) == 8


def test_no_step_is_taken_once_the_time_is_up(train_step, monkeypatch):
    turns, stepped, _ = taking_turns(train_step, monkeypatch, 9, seconds=-1.0)
    assert stepped == [] and turns.missing == {}


def test_steps_so_far_are_on_disk_after_each_round(train_step, tmp_path):
    result = train_step.Result(tmp_path / 'train_step.json')
    seen = []
    for count in (3, 7, 8):  # the first five are not counted
        result.save({'vanilla': [9.0] + [0.2] * (count - 1), 'bare': [0.1] * count})
        seen.append(json.loads((tmp_path / 'train_step.json').read_text()))
    assert [file['steps'] for file in seen] == [{}, {'vanilla': 2, 'bare': 2}, {'vanilla': 3, 'bare': 3}]
    assert seen[2]['milliseconds'] == {'vanilla': 200.0, 'bare': 100.0} and seen[2]['ratios'] == {'vanilla / bare': 2.0}
    assert seen[0]['seconds of the first step'] == {'vanilla': 9.0, 'bare': 0.1}


def test_arms_are_what_their_names_say(train_step, tmp_path):
    def config(arm):
        return train_step.config_of(arm, 7, 'teacher.pth', tmp_path)

    device = config('wsl, loss compiled, device')
    assert device.train_dataloader.dataset.type == 'mmwsl.DeviceDataset' and not device.compile
    assert device.model.distiller.distill_losses.loss_wsl.compile is True and device.model.teacher_norm_eval
    assert config('wsl, triton, device').model.distiller.distill_losses.loss_wsl.compile == 'triton'
    every = config('wsl, every option, compiled, device')
    assert every.compile and every.model.teacher_speed == 'compile_bf16'
    assert not config('wsl, batch statistics').model.teacher_norm_eval
    hooks = {arm: [hook.type for hook in config(arm).custom_hooks] for arm in ('mmrazor', 'mmrazor, channels last')}
    assert hooks == {'mmrazor': ['TurnsHook'], 'mmrazor, channels last': ['mmwsl.ChannelsLastHook', 'TurnsHook']}
    assert config('mmrazor').model.type == 'mmrazor.SingleTeacherDistill'


def test_timms_loss_is_that_of_plain_soft_labels(train_step):
    timm = pytest.importorskip('timm.task', reason='needs a timm with a task of distillation')
    assert hasattr(timm, 'LogitDistillationTask')
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)) for _ in range(2))
    loss_of = train_step.timm_task(student, teacher)
    images, labels = torch.randn(6, 3, 2, 2), torch.randint(5, (6,))
    logits_S, logits_T = student(images), teacher(images)
    soft = (logits_T / 4).softmax(1) * ((logits_T / 4).log_softmax(1) - (logits_S / 4).log_softmax(1))
    expected = torch.nn.functional.cross_entropy(logits_S, labels) + 2.25 * 16 * soft.sum() / 6
    torch.testing.assert_close(loss_of(images, labels), expected)


def test_cached_reads_are_told_from_live_images(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'tools/benchmarks')
    tool = load_tool('benchmarks/cached_reads')
    monkeypatch.setattr(tool, 'SHARD', 3)
    monkeypatch.setattr(tool, 'BATCH', 2)
    turns = []
    monkeypatch.setattr(tool, 'turn', lambda work, count, seconds: turns.append([work() for _ in range(7)]) or (9, 5))
    monkeypatch.setattr(sys, 'argv', ['cached_reads', '--images', '7', '--rounds', '1', '--out', str(tmp_path)])
    tool.main()
    live, in_order, mapped, shuffled, mapped_shuffled = turns
    assert len(live) == 7 and live[0].shape == (2, 1000)
    assert [record.data for record in in_order] == mapped and [record.data for record in shuffled] == mapped_shuffled
    assert mapped != mapped_shuffled and sorted(mapped) == sorted(mapped_shuffled) and len(set(mapped)) == 7
    assert json.loads((tmp_path / 'cached_reads.json').read_text())['a second, bytes of disk']['read shuffled'] == [
        9,
        5,
    ]
    assert 'read shuffled, by memory map' in capsys.readouterr().out


def test_processes_are_compared_with_one_turn_by_turn(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'tools/benchmarks')
    tool = load_tool('benchmarks/processes')
    alone = [(0.1, 0.08), (0.4, 0.09), (0.2, 0.1)]
    times = {tool.ALONE: alone, 'DistributedDataParallel': [(0.1, 0.09), (0.8, 0.11), (0.25, 0.1)]}
    rows = tool.rows_of(times, 2)
    assert list(rows) == [tool.ALONE, 'DistributedDataParallel']
    assert list(rows[tool.ALONE].values()) == pytest.approx([200, 90, 1])
    assert list(rows['DistributedDataParallel'].values()) == pytest.approx([250, 100, 2 * 0.8])
