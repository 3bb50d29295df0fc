import copy
import hashlib
import json
import os
import pickle
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmwsl.cache import AnswerFormat, CacheError, TeacherCache, store
from mmwsl.cache.store import Manifest, Shard, open_shard, strange_shards, write_shard

LENGTH, VIEWS, PARTS = 11, 3, 2
FORM = AnswerFormat(4)
needs_proc = pytest.mark.skipif(
    not Path('/proc/self/fd').exists(), reason='looks at the files that Linux says are open'
)


def make(folder, length=LENGTH, **fields):
    """A cache whose logits are all of them one number: 100 * view + image."""
    folder.mkdir(exist_ok=True)
    manifest = Manifest(
        **{
            **dict(
                seed=7,
                views=VIEWS,
                length=length,
                parts=PARTS,
                answer_format=FORM,
                batch_size=None,
                fingerprint=dict(teacher=dict(weights='a'), data=dict(length=length)),
                versions=dict(torch='0'),
                top1=0.5,
            ),
            **fields,
        }
    )
    for shard in manifest.shards:
        images = torch.arange(shard.part, length, PARTS)
        logits = (100 * shard.view + images).float().unsqueeze(1).expand(-1, 4)
        write_shard(folder, manifest, shard, FORM.encode(logits, images % 4))
    manifest.save(folder)
    return folder


def number(cache, view, image):
    return np.frombuffer(cache.read(view, image).data, FORM.layout)['values'][0, 0]


def read_all(folder):
    cache = TeacherCache(folder)
    return [cache.read(view, image).data for view in range(VIEWS) for image in range(LENGTH)]


def test_each_answer_is_found(tmp_path):
    cache = TeacherCache(make(tmp_path))
    for view, image in [(0, 0), (2, 10), (0, 10), (1, 5), (1, 4), (2, 0)]:
        assert number(cache, view, image) == 100 * view + image


def test_parts_are_strided_so_that_sorted_classes_are_mixed(tmp_path):
    manifest = Manifest.load(make(tmp_path))
    assert [manifest.images(part).tolist() for part in range(2)] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]


def test_answers_are_mapped_and_not_loaded(tmp_path):
    answers = open_shard(make(tmp_path), Manifest.load(tmp_path), Shard(0, 0))
    while not isinstance(answers, np.memmap):
        answers = answers.base
    assert str(answers.filename) == str(tmp_path / '0000-00000.npy')


@needs_proc
def test_only_the_shards_of_one_view_are_open(tmp_path):
    cache = TeacherCache(make(tmp_path))
    for view in range(VIEWS):
        for image in range(LENGTH):
            cache.read(view, image)
        assert open_files(tmp_path) == [f'{view:04}-{part:05}.npy' for part in range(PARTS)]
    del cache
    assert open_files(tmp_path) == []


def open_files(folder):
    """Shards that this process has open."""
    found = [Path(os.path.realpath(file)) for file in Path('/proc/self/fd').iterdir()]
    return sorted(path.name for path in found if path.parent == folder)


@needs_proc
def test_more_shards_than_a_process_may_open_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(store, '_OPEN', 1)
    cache = TeacherCache(make(tmp_path))
    assert [number(cache, 1, image) for image in range(LENGTH)] == [100 + image for image in range(LENGTH)]
    assert len(open_files(tmp_path)) == 1


@needs_proc
def test_a_read_maps_no_file_into_memory(tmp_path):
    cache = TeacherCache(make(tmp_path))
    assert number(cache, 0, 0) == 0 and '0000-00000.npy' in open_files(tmp_path)
    assert str(tmp_path) not in Path('/proc/self/maps').read_text()


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_read_on(tmp_path, copied):
    cache = TeacherCache(make(tmp_path))
    assert number(cache, 1, 3) == 103
    assert number(copied(cache), 1, 4) == 104


def test_every_flipped_byte_of_a_shard_is_found(tmp_path):
    expected = read_all(make(tmp_path))
    shard = tmp_path / '0001-00001.npy'
    content = shard.read_bytes()
    found = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        shard.write_bytes(flipped)
        try:
            assert read_all(tmp_path) == expected  # white space in the header may be other white space
        except CacheError as error:
            assert '0001-00001.npy is damaged or' in str(error) and 'delete it and run tools/cache' in str(error)
            found += position >= len(content) - 5 * FORM.layout.itemsize
    assert found == 5 * FORM.layout.itemsize


@pytest.mark.parametrize('kept', [0, 5, 64, 128, 200, -1])
def test_a_truncated_shard_is_found(tmp_path, kept):
    shard = make(tmp_path) / '0001-00001.npy'
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(CacheError, match=r'0001-00001\.npy is damaged'):
        TeacherCache(tmp_path).read(1, 1)


def test_a_shard_in_anothers_place_is_found(tmp_path):
    make(tmp_path)
    shutil.copy(tmp_path / '0000-00000.npy', tmp_path / '0001-00000.npy')
    with pytest.raises(CacheError, match=r'0001-00000\.npy is damaged or of another cache \(answer 0\)'):
        TeacherCache(tmp_path).read(1, 0)


def test_an_answer_in_anothers_place_is_found(tmp_path):
    shard = make(tmp_path) / '0000-00000.npy'
    answers = np.load(shard)
    answers[[0, 1]] = answers[[1, 0]]
    np.save(shard, answers)
    with pytest.raises(CacheError, match='answer 1'):
        TeacherCache(tmp_path).read(0, 2)
    assert number(TeacherCache(tmp_path), 0, 4) == 4


def test_another_seeds_shard_is_found(tmp_path):
    make(tmp_path / 'seed7')
    make(tmp_path / 'seed8', seed=8)
    (tmp_path / 'seed8/0000-00000.npy').replace(tmp_path / 'seed7/0000-00000.npy')
    with pytest.raises(CacheError, match='damaged'):
        TeacherCache(tmp_path / 'seed7').read(0, 0)


@pytest.mark.parametrize(
    'other',
    [dict(fingerprint=dict(teacher=dict(weights='b'), data=dict(length=LENGTH))), dict(batch_size=20)],
    ids=['teacher', 'batch size'],
)
def test_a_shard_of_another_cache_is_found(tmp_path, other):
    make(tmp_path / 'ours')
    make(tmp_path / 'theirs', **other)
    (tmp_path / 'theirs/0002-00001.npy').replace(tmp_path / 'ours/0002-00001.npy')
    cache = TeacherCache(tmp_path / 'ours')
    assert number(cache, 2, 0) == 200
    with pytest.raises(CacheError, match=r'0002-00001\.npy is damaged or of another cache'):
        cache.read(2, 1)
    assert strange_shards(tmp_path / 'ours', cache.manifest) == [Shard(2, 1)]


def as_format_1(folder):
    """A cache as 0.1.0 wrote it: what is checked does not cover the cache."""
    path = make(folder) / 'cache.json'
    for shard in folder.glob('*.npy'):
        view, part = map(int, shard.stem.split('-'))
        answers = np.load(shard)
        for row in range(len(answers)):
            place = struct.pack('<QQQ', 7, view, part + PARTS * row)
            answers['check'][row] = zlib.crc32(place + answers[row].tobytes()[:-4])
        np.save(shard, answers)
    content = json.loads(path.read_text())
    del content['format'], content['checksum']
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(dict(content, format=1, checksum=checksum)))
    return folder


def test_format_1_is_read_with_a_warning(tmp_path, monkeypatch):
    told = warnings_of_store(monkeypatch)
    cache = TeacherCache(as_format_1(tmp_path))
    assert [number(cache, view, 5) for view in range(VIEWS)] == [5, 105, 205]
    cache.manifest.warn_of_other_versions()
    assert 'has format 1, whose shards do not tell' in told[0]
    Manifest.load(tmp_path).save(tmp_path)  # and stays what it is
    assert Manifest.load(tmp_path).format == 1
    TeacherCache(tmp_path).read(0, 0)


def test_every_flipped_byte_of_the_manifest_is_found(tmp_path):
    path = make(tmp_path) / 'cache.json'
    expected, content = Manifest.load(tmp_path), path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        try:
            assert Manifest.load(tmp_path) == expected
        except CacheError as error:
            assert 'cache.json is' in str(error)


def test_no_cache(tmp_path):
    with pytest.raises(CacheError, match=r'no teacher cache in .*: make one with tools/cache_teacher\.py'):
        TeacherCache(tmp_path)


@pytest.mark.parametrize(
    'unfinished',
    [
        lambda folder: (folder / '0002-00001.npy').unlink(),
        lambda folder: replace(Manifest.load(folder), top1=None).save(folder),
    ],
    ids=['a shard', 'the last check'],
)
def test_an_unfinished_cache_is_refused(tmp_path, unfinished):
    unfinished(make(tmp_path))
    with pytest.raises(CacheError, match=r'not finished, [01] of 6 shards are missing: run tools/cache'):
        TeacherCache(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = make(tmp_path) / 'cache.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format': 3}))
    with pytest.raises(CacheError, match=r'has format 3, and this version of mmwsl reads \(1, 2\)'):
        TeacherCache(tmp_path)


def test_identity_is_that_of_the_answers(tmp_path):
    manifest = Manifest.load(make(tmp_path))
    assert replace(manifest, views=9, top1=None, versions={}).identity == manifest.identity
    assert replace(manifest, seed=9).identity != manifest.identity


def test_caches_of_0_1_0_keep_their_keys_and_identity(tmp_path):
    content = json.loads((make(tmp_path) / 'cache.json').read_text())
    assert content['record'] == dict(classes=4, top_k=None, dtype='float32', taus=[])
    assert 'answer_format' not in content
    assert Manifest.load(tmp_path).identity == '29d3bd030f1f0259'  # as it was when the key was also the field's name


def warnings_of_store(monkeypatch):
    from mmwsl.cache import store

    told = []
    monkeypatch.setattr(store, 'print_log', lambda *args: told.append(args[0]))
    return told


def test_other_versions_are_a_warning(tmp_path, monkeypatch):
    told = warnings_of_store(monkeypatch)
    Manifest.load(make(tmp_path)).warn_of_other_versions()
    assert f"torch is '0' in the cache and '{torch.__version__}' here" in told[0]


def test_check_names_what_differs_and_tells_what_it_could_not_compare(tmp_path, monkeypatch):
    told = warnings_of_store(monkeypatch)
    cache = TeacherCache(make(tmp_path))
    cache.check('teacher', dict(weights='a'))
    assert not told
    cache.check('teacher', dict(weights=None))
    assert 'teacher.weights were not compared' in told[0]
    with pytest.raises(CacheError, match=r"teacher\.weights is 'a' in the cache and 'b' here"):
        cache.check('teacher', dict(weights='b'))
