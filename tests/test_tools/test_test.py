"""tools/test.py, in this process, on small networks and the digits."""
import json
import sys

import pytest
import torch
from mmengine.config import Config

from tests.tiny import PREPROCESSOR, ROOT, build, distillation, load_tool, network, save_teacher


@pytest.fixture
def tested(tmp_path, monkeypatch):
    """Accuracy that tools/test.py finds, of a config's model, and of other settings of the digits."""
    def run(model, *arguments, **settings):
        cfg = Config.fromfile(ROOT / 'configs/wsl_digits.py')
        name = f'{tmp_path.name}_{len(settings)}'
        cfg.merge_from_dict(dict(work_dir=str(tmp_path), experiment_name=name, **settings))
        cfg.model = model
        cfg.dump(tmp_path / 'config.py')
        monkeypatch.setattr(sys, 'argv', ['test.py', str(tmp_path / 'config.py'), *map(str, arguments), '--out',
                                          str(tmp_path / 'out.json'), '--out-item', 'metrics'])
        load_tool('test').main()
        return json.loads((tmp_path / 'out.json').read_text())['accuracy/top1']
    return run


@pytest.fixture
def biased(tmp_path):
    """A student's file, which answers with one class, and the share of the test images that are of it."""
    student = build(network(2, data_preprocessor=PREPROCESSOR))
    with torch.no_grad():
        student.head.fc.weight.zero_()
        student.head.fc.bias.zero_()[3] = 1
    torch.save(student.state_dict(), tmp_path / 'student.pth')
    return tmp_path / 'student.pth', 10.1922  # 122 of 1,197


def test_what_training_began_with_is_not_tested(tested, biased, tmp_path):
    student, share = biased
    other = save_teacher(tmp_path / 'other.pth', network(2))
    assert tested(distillation(), student) == pytest.approx(share, abs=1e-3)
    assert tested(distillation(), student, load_from=other) == pytest.approx(share, abs=1e-3)


def test_an_option_that_nothing_reads_is_refused(tested, biased):
    with pytest.raises(ValueError, match="nothing reads 'test_dataloder'. Did you mean 'test_dataloader'"):
        tested(distillation(), biased[0], '--cfg-options', 'test_dataloder.batch_size=2')
