import io
import json

import numpy as np
import pytest
from mmengine.dataset import ConcatDataset
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmwsl.cache import CacheError, TeacherLosses
from mmwsl.cache.fingerprint import data_fingerprint, training_set

PACKED = [dict(type='PackInputs')]
NOISY = [dict(type='mmwsl.LabelNoise', prob=0.3, num_classes=10, seed=2), *PACKED]


def single(values):
    return np.array(values, np.float32)


def digits(indices=60, pipeline=PACKED, **kwargs):
    init_default_scope('mmpretrain')
    return DATASETS.build(dict(type='mmwsl.Digits', indices=indices, pipeline=pipeline, **kwargs))


def losses_of(dataset):
    labels, images = training_set(dataset)
    return TeacherLosses(np.linspace(0, 1, len(labels), dtype=np.float32), labels, images, {'kind': 'teacher'})


# ---- the file


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / 'new/losses.npz'
    TeacherLosses(single([0, 1e-30, 2.5]), np.array([3, 0, 7]), 'abc', dict(kind='out of fold')).save(path)
    found = TeacherLosses.load(str(path))
    assert found.losses.tolist() == [0, np.float32(1e-30), 2.5] and found.losses.dtype == np.float32
    assert found.labels.tolist() == [3, 0, 7] and found.labels.dtype == np.int64
    assert (found.images, found.about) == ('abc', dict(kind='out of fold'))
    assert [entry.name for entry in path.parent.iterdir()] == ['losses.npz']


@pytest.mark.parametrize(
    'losses, labels, message',
    [
        (single([1, np.nan]), np.array([0, 1]), r'got nan for image 1 \(1 of 2 losses are wrong\)'),
        (single([-1, np.inf]), np.array([0, 1]), r'got -1.0 for image 0 \(2 of 2 losses are wrong\)'),
        (np.array([1.0, 2.0]), np.array([0, 1]), r'float64 of shape \(2,\) and int64 of shape \(2,\)'),
        (single([1, 2]), np.array([0]), r'float32 of shape \(2,\) and int64 of shape \(1,\)'),
        (single([1, 2]), single([0, 1]), r'and float32 of shape \(2,\)'),
        (single(1), np.array(0), r'float32 of shape \(\) and int64 of shape \(\)'),
    ],
)
def test_losses_are_one_number_for_each_label(losses, labels, message):
    with pytest.raises(ValueError, match=message):
        TeacherLosses(losses, labels, '', {})


@pytest.fixture
def path(tmp_path):
    TeacherLosses(single([0.25, 1, 2.5]), np.array([3, 0, 7]), 'abc', dict(kind='teacher')).save(tmp_path / 'l.npz')
    return tmp_path / 'l.npz'


def test_every_flipped_byte_is_found_or_does_no_harm(path):
    content = path.read_bytes()
    found = set()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            loaded = TeacherLosses.load(path)  # zip keeps names twice, and times that nobody reads
            assert loaded.losses.tolist() == [0.25, 1, 2.5] and loaded.labels.tolist() == [3, 0, 7]
            assert (loaded.images, loaded.about) == ('abc', dict(kind='teacher'))
        except CacheError as error:
            assert 'l.npz is damaged, or holds no' in str(error) and 'restore it, or make one with tools' in str(error)
            found.add(position)
    for array in (single([0.25, 1, 2.5]), np.array([3, 0, 7])):
        start = content.index(array.tobytes())
        assert set(range(start, start + array.nbytes)) <= found


@pytest.mark.parametrize('kept', [0, 3, 100, 500, -1])
def test_a_truncated_file_is_found(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CacheError, match='damaged'):
        TeacherLosses.load(path)


def rewritten(path, **changes):
    """The file with other arrays, in a zip that is whole."""
    with np.load(path) as arrays:
        content = {**arrays, **changes}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def test_content_that_was_changed_is_found(path):
    with pytest.raises(CacheError, match='checksum does not match'):
        TeacherLosses.load(rewritten(path, losses=single([0.25, 1, 2])))
    with pytest.raises(CacheError, match='checksum does not match'):
        TeacherLosses.load(rewritten(path, losses=single([0.25, 1, 2.5]), labels=np.array([3, 0, 1])))


def test_losses_that_are_not_finite_are_not_loaded(path):
    with pytest.raises(CacheError, match=r'got inf for image 2'):
        TeacherLosses.load(rewritten(path, losses=single([0.25, 1, np.inf])))


@pytest.mark.parametrize('missing', ['header', 'losses', 'labels'])
def test_arrays_of_something_else(path, missing):
    with pytest.raises(CacheError, match=f'holds no teacher losses .*{missing}'):
        TeacherLosses.load(rewritten(path, **{missing: None}))


def test_another_format_is_named(path):
    header = json.dumps(dict(format=2, something='else')).encode()
    with pytest.raises(CacheError, match='has format 2, and this version of mmwsl reads 1: make one with'):
        TeacherLosses.load(rewritten(path, header=np.frombuffer(header, np.uint8)))


class _RunsCode:
    def __reduce__(self):
        return exec, ('raise SystemExit("it ran")',)


def test_a_pickle_is_not_run(path):
    with pytest.raises(CacheError, match='allow_pickle=False'):
        TeacherLosses.load(rewritten(path, losses=np.array([_RunsCode()], dtype=object)))
    stream = io.BytesIO()
    np.save(stream, np.array([_RunsCode()], dtype=object))
    path.write_bytes(stream.getvalue())
    with pytest.raises(CacheError, match='allow_pickle=False'):
        TeacherLosses.load(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CacheError, match=r'no file of teacher losses .*l\.npz: make one with tools/teacher_losses\.py'):
        TeacherLosses.load(tmp_path / 'l.npz')
    with pytest.raises(IsADirectoryError):
        TeacherLosses.load(tmp_path)


# ---- the training set


@pytest.mark.parametrize(
    'wrapper',
    [
        dict(type='mmwsl.SeededViews'),
        dict(type='mmwsl.BootstrapDataset', seed=0),
        dict(type='mmwsl.Fold'),
        dict(type='mmwsl.DeviceDataset', device='cpu'),
        dict(type='RepeatDataset', times=2),
    ],
    ids=lambda config: config['type'],
)
def test_wrappers_and_other_pipelines_are_the_same_training_set(wrapper):
    losses = losses_of(digits(pipeline=NOISY))
    losses.check(digits(pipeline=[dict(type='RandomFlip', prob=0.5), *NOISY]))
    losses.check(DATASETS.build(dict(**wrapper, dataset=digits(pipeline=NOISY))))


def test_labels_are_those_of_the_items(tmp_path):
    dataset = digits(pipeline=NOISY)
    labels, _ = training_set(DATASETS.build(dict(type='mmwsl.BootstrapDataset', seed=0, dataset=dataset)))
    assert labels.tolist() == [dataset[index]['data_samples'].gt_label.item() for index in range(60)]
    assert 5 < (labels != training_set(digits())[0]).sum() < 30  # 18 are expected to be wrong


def test_other_labels_are_named():
    losses = losses_of(digits())
    noisy, _ = training_set(digits(pipeline=NOISY))
    wrong = np.flatnonzero(noisy != losses.labels)
    with pytest.raises(
        CacheError,
        match=rf'training set: labels of {len(wrong)} of 60 images are different \(image '
        rf'{wrong[0]}: {losses.labels[wrong[0]]} in the file and {noisy[wrong[0]]} here\)\. Correct',
    ):
        losses.check(digits(pipeline=NOISY))


def test_another_number_of_images_is_named():
    with pytest.raises(CacheError, match='training set: length is 60 in the file and 50 here'):
        losses_of(digits()).check(digits(indices=50))


def test_other_images_are_named():
    dataset = digits(serialize_data=False)
    losses = losses_of(dataset)
    dataset.data_list[7]['img'] = dataset.data_list[7]['img'] ^ 1
    with pytest.raises(CacheError, match=r'training set: images are different\. Correct'):
        losses.check(dataset)


@pytest.fixture
def folder(tmp_path):
    def make(name, images=('0.png', '1.png')):
        for label in ('cat', 'dog'):
            (tmp_path / name / label).mkdir(parents=True)
            for image in images:
                Image.new('RGB', (4, 4)).save(tmp_path / name / label / image)
        init_default_scope('mmpretrain')
        pipeline = [dict(type='LoadImageFromFile'), *PACKED]
        return DATASETS.build(dict(type='CustomDataset', data_root=str(tmp_path / name), pipeline=pipeline))

    return make


def test_files_are_compared_by_name_and_not_by_place(folder):
    losses = losses_of(folder('here'))
    assert losses.labels.tolist() == [0, 0, 1, 1]
    losses.check(folder('there'))
    with pytest.raises(CacheError, match='images are different'):
        losses.check(folder('elsewhere', ['0.png', '2.png']))


def test_images_have_the_fingerprint_of_a_cache():
    assert training_set(digits())[1] == data_fingerprint({}, digits())['images']


def test_a_place_that_is_not_unique_is_refused():
    joined = ConcatDataset([digits(), digits()])
    for dataset in (joined, DATASETS.build(dict(type='mmwsl.SeededViews', dataset=joined))):
        with pytest.raises(ValueError, match='looked up by its sample_idx, and a ConcatDataset uses the same'):
            training_set(dataset)


class MultiLabel(list):
    def get_data_info(self, index):
        return self[index]


@pytest.mark.parametrize('label', [[1, 2], []])
def test_an_image_without_one_class_is_refused(label):
    dataset = MultiLabel([dict(gt_label=4, sample_idx=0), dict(gt_label=label, sample_idx=1)])
    with pytest.raises(ValueError, match=r'one class, got gt_label=\[.*\] for image 1'):
        training_set(dataset)


def test_a_dataset_that_does_not_tell_its_images_is_refused():
    with pytest.raises(ValueError, match='and list lacks: derive it from mmpretrain.BaseDataset'):
        training_set([1, 2])
