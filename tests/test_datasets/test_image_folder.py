import hashlib

import numpy as np
import pytest
from PIL import Image

from mmwsl.datasets.image_folder import inspect_folder


def save(path, size=(32, 32), mode='RGB', colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def split(tmp_path):
    """Two classes of training and validation images, with what people have in such folders besides."""
    for name, images in dict(cat=3, dog=2).items():
        for number in range(images):
            save(tmp_path / f'train/{name}/{number}.png', (40 + number, 30), 'L' if number else 'RGB')
        save(tmp_path / f'val/{name}/0.jpg', (60, 20))
    (tmp_path / 'train/cat/empty.png').touch()
    whole = (tmp_path / 'val/dog/0.jpg').read_bytes()
    (tmp_path / 'val/dog/cut.jpg').write_bytes(whole[: len(whole) // 2])
    (tmp_path / 'train/dog/notes.txt').write_text('mine')
    (tmp_path / 'train/.cache').mkdir()
    (tmp_path / 'train/dog/.hidden.png').write_text('')
    return tmp_path


def test_what_is_in_a_folder_is_told(split):
    assert inspect_folder(split).describe().splitlines() == [
        f'{split}: 2 classes (cat, dog)',
        '  5 training and 2 validation images, from train/ and val/',
        '  2 to 3 training images a class',
        '  40 x 20 to 60 x 30 pixels, 3 grey, the others in colour',
        '  left out: 1 hidden folders: train/.cache',
        '  left out: 2 empty or broken files: train/cat/empty.png, val/dog/cut.jpg',
        '  left out: 1 files that do not end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif: train/dog/notes.txt',
    ]


def test_a_clean_folder_is_read_as_it_is(split):
    (split / 'train/cat/empty.png').unlink()
    (split / 'val/dog/cut.jpg').unlink()
    assert inspect_folder(split).needs_lists  # a hidden folder would become a class
    (split / 'train/.cache').rmdir()
    found = inspect_folder(split)
    assert not found.needs_lists and found.prefixes == ('train', 'val')
    assert [(image.path, image.label) for image in found.val] == [('val/cat/0.jpg', 0), ('val/dog/0.jpg', 1)]
    assert found.edge == 30


def test_a_folder_without_a_split_is_split_the_same_way_each_time(tmp_path):
    names = [f'{name}/{number}.png' for name in 'ab' for number in range(10)]
    for name in names:
        save(tmp_path / name)
    found = inspect_folder(tmp_path)
    expected = [
        sorted((name for name in names if name[0] == of), key=lambda name: hashlib.sha256(name.encode()).hexdigest())[
            :2
        ]
        for of in 'ab'
    ]  # a fifth of ten
    assert [image.path for image in found.val] == [*expected[0], *expected[1]]
    assert sorted(image.path for image in found.train) == sorted({*names} - {*expected[0], *expected[1]})
    assert found.needs_lists and 'split by the names of the files' in found.describe()


def test_names_of_the_parts_may_be_capital(split):
    (split / 'train').rename(split / 'Train')
    assert inspect_folder(split).prefixes == ('Train', 'val')


def test_images_in_both_parts_are_named(split):
    assert inspect_folder(split).in_both() == []
    (split / 'val/dog/again.png').write_bytes((split / 'train/cat/2.png').read_bytes())
    expected = '  1 validation images are training images, too, so figures will be too good: val/dog/again.png'
    assert expected in inspect_folder(split).describe().splitlines()


def test_statistics_are_of_all_pixels(tmp_path):
    for name, colour in dict(a=(0, 10, 7), b=(200, 30, 7)).items():
        save(tmp_path / 'train' / name / '0.png', colour=colour)
        save(tmp_path / 'val' / name / '0.png')
    mean, std = inspect_folder(tmp_path).statistics()
    assert np.allclose(mean, [100, 20, 7]) and np.allclose(std, [100, 10, 1])  # not 0, by which one would divide


@pytest.mark.parametrize(
    'made, data, message',
    [
        ((), 'nothing', r'there is no folder .*nothing; in .* there is none\. Give --data the folder with'),
        (('mine/a/0.png', 'a/0.png'), 'mne', r'there is no folder .*mne; in .* there is mine\. Give'),
        (('up/a/0.png', 'up/b/0.png'), '', r'two classes or more.*got 1 \(up\)\. Give --data .*up$'),
        (
            ('Train/a/0.png', 'Train/b/0.png', 'dev/a/0.png'),
            '',
            r'has Train/ and no folder of validation images \(val, .*only Train, dev\. Rename .*Train, which',
        ),
        (
            ('train/a/0.png', 'train/b/0.png', 'val/a/0.txt', 'val/b/0.txt'),
            '',
            r'no validation image that opens .* in .*val\. Add images, or give --data .*train, which',
        ),
        (('a/0.png', 'b/0.png'), '', r'each class in .* has one image, and needs one more for'),
        (('a/0.png', 'a/1.png'), '', r'two classes or more.*got 1 \(a\)\. Give --data the folder above'),
        (('train/a/0.png', 'val/a/0.png'), '', r'two classes or more.*got 1 \(a\)\. Give --data the folder above'),
        (('0.png',), '', r'two classes or more.*got none'),
        (
            ('train/a/0.png', 'train/b/0.png', 'val/a/0.png', 'val/B/0.png'),
            '',
            r'should have the same classes; only in train/: b; only in val/: B\. Give both the same class folders',
        ),
        (
            ('a/0.png', 'b/0.txt'),
            '',
            r'no training image .* can be opened for the class b; left out were b/0\.txt\. Add',
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_explained(tmp_path, made, data, message):
    for name in made:
        path = tmp_path / name
        save(path) if path.suffix == '.png' else (path.parent.mkdir(parents=True), path.touch())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        inspect_folder(tmp_path / data)
