import io

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmwsl.engine import add_hooks, add_progress, console
from mmwsl.engine.overview import legend
from tests.tiny import build, digits_config, distillation

pytestmark = pytest.mark.filterwarnings('ignore:teacher_ckpt is None')


@pytest.fixture
def logger(tmp_path, request):
    """One that writes to a console in memory and to a file."""
    made = MMLogger(request.node.name, log_file=str(tmp_path / 'all.log'))
    made.handlers[0].stream = io.StringIO()
    yield made
    made.handlers[1].close()


def said(logger):
    """What its console has shown."""
    return logger.handlers[0].stream.getvalue()


def speak(logger):
    logger.info('Checkpoints will be saved')
    logger.warning('The teacher is weak')
    logger.warning('"FileClient" will be deprecated in future')
    console.tell(logger, 'Done')
    console.show(logger, '1/10 12/12')


def test_a_quiet_console_shows_what_is_told_and_warnings_and_the_file_has_the_log(logger, tmp_path):
    assert not console.is_quiet(logger)
    console.quiet(console.quiet(logger))
    speak(logger)
    assert said(logger) == 'Warning: The teacher is weak\nDone\n1/10 12/12\n'
    kept = (tmp_path / 'all.log').read_text()
    assert all(text in kept for text in ('Checkpoints', 'teacher is weak', 'FileClient', 'Done'))
    assert '12/12' not in kept
    console.unquiet(logger)
    logger.info('Checkpoints will be saved')
    assert said(logger).endswith('Checkpoints will be saved\n')


def test_a_loud_console_shows_mmengines_log(logger):
    speak(logger)
    assert all(text in said(logger) for text in ('Checkpoints', 'FileClient', 'mmengine'))
    assert '12/12' not in said(logger)


@pytest.mark.parametrize(
    'error, expected',
    [
        (ValueError('lr is 0: set optim_wrapper'), 'Error: lr is 0: set optim_wrapper\n'),
        (KeyError('loss'), "Error: KeyError: 'loss'\n"),
    ],
    ids=['ours', 'a bug'],
)
def test_an_error_is_its_message_and_the_file_has_its_traceback(logger, tmp_path, monkeypatch, error, expected):
    monkeypatch.setattr(MMLogger, 'get_current_instance', lambda: logger)
    with pytest.raises(SystemExit) as ended, console.one_screen(verbose=False):
        raise error
    assert ended.value.code == 1
    assert said(logger) == f'{expected}The traceback is in {tmp_path / "all.log"}.\n'
    kept = (tmp_path / 'all.log').read_text()
    assert 'Traceback (most recent call last)' in kept and 'raise error' in kept
    with pytest.raises(type(error)), console.one_screen(verbose=True):
        raise error


WSL = dict(
    type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25))
)


@pytest.fixture(scope='module')
def console_of_a_run(tmp_path_factory):
    """What two epochs of six steps show, and the runner."""
    work_dir, written = tmp_path_factory.mktemp('shown'), io.StringIO()
    cfg = digits_config(work_dir, distillation(distiller=WSL), 2, default_hooks=dict(logger=dict(interval=4)))
    add_hooks(cfg)
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if 'CheckTeacher' not in hook['type']]
    runner = console.build_runner(cfg)
    runner.logger.handlers[0].stream = written
    runner.train()
    return written.getvalue().splitlines(), runner


def test_a_run_begins_with_one_screen(console_of_a_run):
    lines, runner = console_of_a_run
    values = sum(parameter.numel() for parameter in runner.model.student.parameters())
    begin = next(place for place, line in enumerate(lines) if ' trains digits_student, seed 0' in line)
    assert lines[begin + 1].startswith(f'  student  ImageClassifier of CIFARResNet, {values:,} parameters')
    assert lines[begin + 2].startswith('  teacher  ImageClassifier of CIFARResNet, ')
    assert lines[begin + 3 : begin + 6] == [
        '  by       loss_wsl: 2.25 * SoftCrossEntropy at tau 4, weighted by WSLWeighting',
        '  data     600 images, 1,197 for validation, 10 classes; 100 in a batch',
        '  length   2 epochs of 6 steps',
    ]


def test_a_row_has_what_the_log_has_and_names_are_explained_once(console_of_a_run):
    lines, runner = console_of_a_run
    (head,) = [line for line in lines if line.split()[:2] == ['epoch', 'step']]
    assert head.split()[2:] == [
        'loss',
        'student.loss',
        'distill.loss_wsl',
        'distill.kl',
        'distill.wsl_weight',
        'lr',
        'left',
    ]
    rows = [line.split() for line in lines if line.split()[:1] in (['1/2'], ['2/2'])]
    assert [row[:2] for row in rows] == [['1/2', '4/6'], ['2/2', '4/6']]
    hub = runner.message_hub
    for place, name in enumerate(head.split()[2:5], 2):
        logged, _ = hub.get_scalar(f'train/{name}').data  # a loss is a mean of ten steps, of which there are ten
        assert float(rows[1][place]) == pytest.approx(sum(logged[:10]) / 10, rel=1e-3), name
    assert sum('guessing costs 2.303, the logarithm of 10' in line for line in lines) == 1
    assert [line.partition(':')[0] for line in lines if line.startswith('validation')] == [
        'validation after epoch 1',
        'validation after epoch 2',
    ]


def test_a_quiet_run_is_short(console_of_a_run):
    lines, _ = console_of_a_run
    assert len(lines) < 40 and not [line for line in lines if 'INFO' in line or 'dict(' in line]


def test_the_legend_tells_what_cannot_reach_0():
    model = build(
        distillation(
            distiller=dict(
                type='mmwsl.WSLDistiller',
                distill_losses=dict(
                    loss_wsl=dict(type='mmwsl.WSLLoss', tau=4.0, loss_weight=2.25),
                    loss_dkd=dict(type='mmwsl.WeightedLoss', loss=dict(type='DKD')),
                ),
            )
        )
    )
    text = legend(model, ['loss', 'distill.loss_wsl', 'distill.loss_dkd', 'distill.kl'])
    assert '2.25 * weight * 4^2 * cross-entropy with the teacher at tau: large, and never 0' in text
    assert 'loss_dkd' not in text and text.count('\n') == 2


def test_a_test_shows_how_far_it_is_once_and_then_all_figures(console_of_a_run):
    _, runner = console_of_a_run
    cfg = Config(dict(custom_hooks=[dict(type='EMAHook')]))
    for _ in range(2):  # a config that a run has written has the hook
        add_progress(cfg)
        assert cfg.custom_hooks == [dict(type='EMAHook'), dict(type='mmwsl.ProgressHook')]
    stream = runner.logger.handlers[0].stream = io.StringIO()
    runner.test()
    lines = [line for line in stream.getvalue().splitlines() if not line.startswith('Warning')]
    assert lines[0] == 'Testing on 1,197 images.' and lines[-1].startswith('Epoch(test) [3/3]    accuracy/top1: ')
    assert len(lines) == 2
