"""Runs in three files: nothing of them is lost, whoever writes when, and nothing stands twice."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmwsl.engine.kept_runs import KeptRuns

CONFIG = """model = dict(type='A')
randomness = dict(deterministic=False, seed={seed})
work_dir = 'work_dirs/a-seed={seed}'
"""


def keep(folder, seed, name='a', config=CONFIG, **fields):
    KeptRuns(folder).keep(
        dict(name=f'{name}-seed={seed}', seed=seed, **fields),
        [dict(step=1, loss=float(seed))],
        config.format(seed=seed),
    )


def test_what_is_kept_is_found_again(tmp_path):
    assert KeptRuns(tmp_path / 'none').all() == [] and KeptRuns(tmp_path / 'none').find('a-seed=1') is None
    keep(tmp_path, 1, last=50.0)
    keep(tmp_path, 0, last=60.0)
    kept = KeptRuns(tmp_path)
    assert [run['name'] for run in kept.all()] == ['a-seed=0', 'a-seed=1']
    assert kept.find('a-seed=1')['last'] == 50.0 and kept.curves()['a-seed=1'] == [dict(step=1, loss=1.0)]
    assert kept.config_of(kept.find('a-seed=1')).to_dict() == dict(
        model=dict(type='A'), randomness=dict(deterministic=False, seed=1)
    )


def test_runs_that_differ_in_their_seed_share_a_config(tmp_path):
    keep(tmp_path, 0)
    keep(tmp_path, 1)
    keep(tmp_path, 0, 'b', CONFIG.replace("'A'", "'B'"))
    assert [len((tmp_path / f'{name}.jsonl').read_text().splitlines()) for name in ('runs', 'curves', 'configs')] == [
        3,
        3,
        2,
    ]


def test_a_run_of_the_same_name_is_replaced_and_its_config_goes(tmp_path):
    keep(tmp_path, 0, last=50.0)
    keep(tmp_path, 0, last=55.0, config=CONFIG.replace("'A'", "'C'"))
    [run], [text] = KeptRuns(tmp_path).all(), KeptRuns(tmp_path).configs().values()
    assert run['last'] == 55.0 and "'C'" in text


def test_jobs_that_end_at_once_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: keep(tmp_path, seed), range(16)))
    assert {run['seed'] for run in KeptRuns(tmp_path).all()} == set(range(16))
    assert len(KeptRuns(tmp_path).curves()) == 16


def test_a_line_that_is_damaged_names_the_file(tmp_path):
    keep(tmp_path, 0)
    (tmp_path / 'runs.jsonl').write_text('{"name": \n')
    with pytest.raises(ValueError, match=r'runs.jsonl is damaged: a line of it is not JSON'):
        keep(tmp_path, 1)
    assert json.loads((tmp_path / 'curves.jsonl').read_text())['name'] == 'a-seed=0'
