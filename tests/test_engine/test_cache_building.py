import fcntl
import json
import os
import random
import re
import signal
import sys

import numpy as np
import pytest
import torch

from mmwsl.cache import CacheError, TeacherCache
from mmwsl.datasets import SeededViews
from mmwsl.datasets.views import View
from mmwsl.engine.cache_building import build_model, dataset_config
from mmwsl.utils import load_network
from tests.caches import cached, contents, live, make_cache
from tests.tiny import PREPROCESSOR, batch, build, network, on_device, save_teacher


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp('teacher') / 'teacher.pth')


def teachers_answer(path, dataset, views, training=False):
    """By another way: the network by itself."""
    net = build(network(4))
    load_network(net, path)
    net.train(training)
    inputs = torch.stack([dataset[view]['inputs'] for view in views]).float()
    with torch.no_grad():
        return net((inputs - PREPROCESSOR['mean'][0]) / PREPROCESSOR['std'][0])


def read(cache, views):
    form = cache.manifest.answer_format
    data = b''.join(cache.read(view.epoch, view.image).data for view in views)
    return form.decode(np.frombuffer(data, form.layout))


def test_records_are_the_teachers_answers_to_the_views(tmp_path, teacher):
    cfg = live(teacher)
    cache = TeacherCache(make_cache(tmp_path, cfg, views=2, seed=5, shard_size=30))
    dataset = SeededViews(dataset_config(cfg))
    views = [View(image, view, 5) for view in range(2) for image in range(100)]
    expected = teachers_answer(teacher, dataset, views)
    torch.testing.assert_close(read(cache, views), expected, rtol=1e-4, atol=1e-4)
    assert cache.manifest.parts == 4
    labels = torch.tensor([dataset.get_data_info(view.image)['gt_label'] for view in views])
    assert cache.manifest.top1 == int((expected.argmax(1) == labels).sum()) / 200


@pytest.mark.parametrize('speed, runs_as', [('bf16', 'fold'), ('compile_bf16', 'compile'), ('plain', 'plain')])
def test_teacher_answers_in_full_precision(teacher, speed, runs_as):
    assert build_model(live(teacher, teacher_speed=speed)).teacher_speed == runs_as


def test_images_on_the_device_are_not_cached(tmp_path, teacher):
    cfg = live(teacher)
    cfg.merge_from_dict(on_device())
    with pytest.raises(ValueError, match=r'got mmwsl\.DeviceDataset: remove this wrapper, and let mmwsl\.SeededViews'):
        make_cache(tmp_path, cfg)


def test_batch_statistics_are_those_of_a_batch_of_the_build(tmp_path, teacher):
    cfg = live(teacher, images=20, teacher_norm_eval=False)
    cache = TeacherCache(make_cache(tmp_path, cfg, views=1))
    views = [View(image, 0, 0) for image in range(20)]  # one batch, whatever its order
    expected = teachers_answer(teacher, SeededViews(dataset_config(cfg)), views, training=True)
    torch.testing.assert_close(read(cache, views), expected, rtol=1e-4, atol=1e-4)
    assert cache.manifest.batch_size == 20


def test_batches_are_of_nearly_equal_size(tmp_path, teacher, monkeypatch):
    sizes = []
    from mmwsl.models import WSLDistill

    answer = WSLDistill.teacher_logits
    monkeypatch.setattr(
        WSLDistill,
        'teacher_logits',
        lambda self, inputs, samples: sizes.append(len(inputs)) or answer(self, inputs, samples),
    )
    make_cache(tmp_path, live(teacher, images=41), views=1)  # 20, 20 and 1 would be of no use to batch statistics
    assert sizes[-3:] == [14, 14, 13]


def test_workers_make_the_same_cache(tmp_path, teacher):
    make_cache(tmp_path / 'alone', live(teacher))
    make_cache(tmp_path / 'workers', live(teacher, num_workers=2))
    assert contents(tmp_path / 'workers') == contents(tmp_path / 'alone')


def test_a_cached_config_builds_what_its_live_one_builds(tmp_path, teacher):
    make_cache(tmp_path / 'live', live(teacher))
    make_cache(tmp_path / 'cached', cached(live(teacher), tmp_path / 'cached'))
    assert contents(tmp_path / 'cached') == contents(tmp_path / 'live')


def test_taus_are_the_losses_unless_given(tmp_path, teacher):
    make_cache(tmp_path / 'own', live(teacher), top_k=3)
    make_cache(tmp_path / 'given', live(teacher), top_k=3, taus=[8, 4])
    assert TeacherCache(tmp_path / 'own').manifest.answer_format.taus == (2.0,)
    assert TeacherCache(tmp_path / 'given').manifest.answer_format.taus == (4.0, 8.0)


# killed at any line


def in_a_child(function, *args):
    """Run in a forked process; returns its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*args)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def build_counting_lines(folder, cfg, kill_at=None, count=None):
    """Build; at the given line of mmwsl/cache that is executed, die. Without one, note how many there are."""
    executed = 0

    def on_line(frame, event, arg):
        nonlocal executed
        executed += event == 'line'
        if executed == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    sys.settrace(lambda frame, event, arg: on_line if '/mmwsl/cache/' in frame.f_code.co_filename else None)
    make_cache(folder, cfg, views=3, shard_size=40)
    sys.settrace(None)
    if count:
        count.write_text(str(executed))


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob('*.npy')}


@pytest.mark.slow
def test_killed_at_20_places_and_started_again(tmp_path, teacher):
    cfg = live(teacher)
    whole, count = tmp_path / 'whole', tmp_path / 'count'
    assert in_a_child(build_counting_lines, whole, cfg, None, count) == 0
    lines, expected = int(count.read_text()), contents(whole)
    assert len(expected) == 10
    chosen = random.Random(0)
    finished = []
    for kill in range(20):
        folder = tmp_path / str(kill)
        assert in_a_child(build_counting_lines, folder, cfg, chosen.randrange(1, lines)) == -signal.SIGKILL
        before = stamps(folder)
        assert in_a_child(build_counting_lines, folder, cfg) == 0
        after = stamps(folder)
        assert contents(folder) == expected
        assert {name: after[name] for name in before} == before  # what was finished was not made again
        finished.append(len(before))
    assert len(set(finished)) > 5  # the kills were spread


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_killed_between_the_steps_of_a_write(tmp_path, teacher, call):
    cfg = live(teacher)
    expected = contents(make_cache(tmp_path / 'whole', cfg))

    def killed():
        original, calls = getattr(os, call), []

        def patched(*args):
            calls.append(args)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(os, call, patched)
        make_cache(tmp_path / 'killed', cfg)

    assert in_a_child(killed) == -signal.SIGKILL
    make_cache(tmp_path / 'killed', cfg)
    assert contents(tmp_path / 'killed') == expected


def test_what_was_left_half_written_is_not_read(tmp_path, teacher):
    make_cache(tmp_path, live(teacher))
    expected = contents(tmp_path)
    (tmp_path / '0001-00000.npy').rename(tmp_path / '0001-00000.npy.0123.partial')
    make_cache(tmp_path, live(teacher))
    assert contents(tmp_path) == expected


# other settings


@pytest.mark.parametrize(
    'other, options, field',
    [
        (dict(), dict(seed=1), 'seed is 0 in the cache and 1 here'),
        (dict(), dict(top_k=3), 'record.top_k is None in the cache and 3 here'),
        (dict(), dict(dtype='float16'), "record.dtype is 'float32' in the cache and 'float16' here"),
        (dict(), dict(shard_size=50), 'parts is 1 in the cache and 2 here'),
        (dict(), dict(views=1), 'views is 2 in the cache and 1 here'),
        (dict(images=99), dict(), 'length is 100 in the cache and 99 here'),
        (dict(teacher_norm_eval=False), dict(), 'batch_size is None in the cache and 20 here'),
        (dict(teacher=network(4, init_cfg=[])), dict(), r'fingerprint\.teacher\.config\.init_cfg is None in the cache'),
    ],
    ids=str,
)
def test_going_on_with_other_settings_is_refused(tmp_path, teacher, other, options, field):
    make_cache(tmp_path, live(teacher))
    before = contents(tmp_path)
    with pytest.raises(CacheError, match=field):
        make_cache(tmp_path, live(teacher, **other), **options)
    assert contents(tmp_path) == before


def test_going_on_with_other_weights_is_refused(tmp_path, teacher):
    make_cache(tmp_path / 'cache', live(teacher))
    other = save_teacher(tmp_path / 'other.pth', seed=2)
    with pytest.raises(CacheError, match=r'fingerprint\.teacher\.weights is'):
        make_cache(tmp_path / 'cache', live(other))


def test_the_same_weights_in_another_file_are_the_same(tmp_path, teacher):
    make_cache(tmp_path / 'cache', live(teacher))
    moved = tmp_path / 'moved.pth'
    torch.save({'model': torch.load(teacher)['state_dict']}, moved)
    make_cache(tmp_path / 'cache', live(str(moved)))


def test_another_batch_size_matters_to_batch_statistics_alone(tmp_path, teacher):
    make_cache(tmp_path / 'eval', live(teacher))
    make_cache(tmp_path / 'eval', live(teacher, batch_size=25))
    make_cache(tmp_path / 'batch', live(teacher, teacher_norm_eval=False))
    with pytest.raises(CacheError, match='batch_size is 20 in the cache and 25 here'):
        make_cache(tmp_path / 'batch', live(teacher, batch_size=25, teacher_norm_eval=False))


def test_views_can_be_added(tmp_path, teacher):
    make_cache(tmp_path / 'grown', live(teacher), views=1)
    before = stamps(tmp_path / 'grown')
    make_cache(tmp_path / 'grown', live(teacher), views=3)
    assert stamps(tmp_path / 'grown').items() > before.items()
    assert contents(tmp_path / 'grown') == contents(make_cache(tmp_path / 'whole', live(teacher), views=3))


def test_two_builds_do_not_fill_one_folder(tmp_path, teacher):
    with (tmp_path / 'lock').open('a') as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match=f'another process is filling {tmp_path}: wait for it or end it'):
            make_cache(tmp_path, live(teacher))
    assert not list(tmp_path.glob('*.npy'))
    make_cache(tmp_path, live(teacher))


def test_shards_without_their_manifest_are_refused(tmp_path, teacher):
    make_cache(tmp_path, live(teacher))
    (tmp_path / 'cache.json').unlink()
    with pytest.raises(CacheError, match=r'holds shards, but no cache\.json'):
        make_cache(tmp_path, live(teacher))


def test_shards_of_another_teachers_cache_are_refused_by_name(tmp_path, teacher):
    make_cache(tmp_path / 'ours', live(teacher), views=4)
    make_cache(tmp_path / 'theirs', live(save_teacher(tmp_path / 'other.pth', seed=2)), views=2)
    for file in (tmp_path / 'theirs').iterdir():  # its cache.json, too
        file.replace(tmp_path / 'ours' / file.name)
    with pytest.raises(
        CacheError,
        match=r'holds 2 shards that are damaged or of another cache: 0002-00000\.npy, '
        r'0003-00000\.npy\. Delete them and repeat',
    ):
        make_cache(tmp_path / 'ours', live(str(tmp_path / 'other.pth')), views=4)
    for name in ('0002-00000.npy', '0003-00000.npy'):
        (tmp_path / 'ours' / name).unlink()
    make_cache(tmp_path / 'ours', live(str(tmp_path / 'other.pth')), views=4)
    TeacherCache(tmp_path / 'ours').read(3, 0)


def test_a_cache_of_format_1_is_checked_and_not_extended(tmp_path, teacher, monkeypatch):
    from mmwsl.engine import cache_building

    monkeypatch.setattr(cache_building, 'FORMAT', 1)  # builds one as 0.1.0 did
    monkeypatch.setattr(cache_building.Manifest.__init__, '__defaults__', (None, 1))
    make_cache(tmp_path, live(teacher))
    monkeypatch.undo()
    before = contents(tmp_path)
    make_cache(tmp_path, live(teacher))
    with pytest.raises(CacheError, match='format 1, which can be read but not extended, and 1 of 3 shards are missing'):
        make_cache(tmp_path, live(teacher), views=3)
    assert contents(tmp_path) == before


def test_damage_is_found_at_the_end(tmp_path, teacher):
    make_cache(tmp_path, live(teacher))
    shard = tmp_path / '0001-00000.npy'
    content = bytearray(shard.read_bytes())
    content[-70] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CacheError, match=r'0001-00000\.npy is damaged or .* \(answer 98\): delete it and run .* again'):
        make_cache(tmp_path, live(teacher))


def test_a_disk_that_is_too_small_is_refused_before_the_start(tmp_path, teacher, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(CacheError, match=r'0\.00 GB of free disk.*fewer --views, --top-k'):
        make_cache(tmp_path, live(teacher))
    assert not list(tmp_path.glob('*.npy'))


def test_size_and_time_are_told_before_the_start(tmp_path, teacher, monkeypatch):
    from mmwsl.engine import cache_building as module

    told = []
    monkeypatch.setattr(module, 'print_log', lambda text, logger: told.append((text, [*tmp_path.glob('*.npy')])))
    make_cache(tmp_path, live(teacher))
    text, shards = told[0]
    assert not shards
    assert re.match(
        r'2 of 2 shards are missing: 200 answers of 53 bytes, 0\.00 GB \(.* GB are free\), in about '
        r'\d:\d\d:\d\d with 1 process',
        text,
    )


@pytest.mark.parametrize('place', ['data_preprocessor', 'architecture'])
def test_mixing_is_refused(tmp_path, teacher, place):
    mixing = dict(augments=[dict(type='mmpretrain.Mixup', alpha=0.8), dict(type='mmpretrain.ResizeMix', alpha=1.0)])
    cfg = live(teacher)
    if place == 'architecture':
        cfg.model.architecture.train_cfg = mixing
    else:
        cfg.model.data_preprocessor = dict(PREPROCESSOR, batch_augments=mixing)
    with pytest.raises(
        ValueError, match='Mixup and ResizeMix mixes images, and a teacher cache holds answers to single images'
    ):
        make_cache(tmp_path, cfg)


def test_a_network_alone_has_no_teacher(tmp_path, teacher):
    cfg = live(teacher)
    cfg.model = cfg.model.architecture
    with pytest.raises(ValueError, match='config of an mmwsl.WSLDistill, got a ImageClassifier'):
        make_cache(tmp_path, cfg)


def test_images_of_several_classes_are_refused(teacher):
    from mmwsl.engine.cache_building import answers, build_model

    data = batch()
    data['data_samples'][2].set_gt_label([1, 2])
    with pytest.raises(ValueError, match='one class each'):
        answers(build_model(live(teacher)), data)


def test_manifest_names_versions(tmp_path, teacher):
    make_cache(tmp_path, live(teacher))
    assert json.loads((tmp_path / 'cache.json').read_text())['versions']['torch'] == torch.__version__
