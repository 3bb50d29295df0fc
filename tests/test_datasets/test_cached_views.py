import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from torch.utils.data import DataLoader

from mmwsl.cache import CacheError
from mmwsl.datasets import CachedViews, SeededViews, ViewSampler
from mmwsl.datasets.views import View
from tests.caches import PIPELINE, cached, live, make_cache
from tests.test_datasets.test_views import states
from tests.tiny import save_teacher

SEED, VIEWS = 6, 3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('cached_views')
    return make_cache(root / 'cache', live(save_teacher(root / 'teacher.pth')), VIEWS, seed=SEED, shard_size=30)


def config(**kwargs):
    init_default_scope('mmpretrain')
    return {**dict(type='mmwsl.Digits', split='train', indices=100, pipeline=PIPELINE), **kwargs}


def cached_views(folder, **kwargs):
    return CachedViews(config(**kwargs), cache=str(folder))


def test_an_epoch_is_the_view_of_the_cache_that_it_is_modulo_v(folder):
    dataset, alone = cached_views(folder), SeededViews(config())
    for image in (0, 7, 99):
        for epoch in range(2 * VIEWS):
            replayed = dataset[View(image, epoch, 12345)]
            expected = alone[View(image, epoch % VIEWS, SEED)]
            assert torch.equal(replayed['inputs'], expected['inputs'])
            assert replayed['data_samples'].teacher_answer == dataset.cache.read(epoch % VIEWS, image)


def test_views_differ(folder):
    dataset = cached_views(folder)
    first, second = (torch.stack([dataset[View(image, epoch, 0)]['inputs'] for image in range(20)]) for epoch in (0, 1))
    assert (first != second).any()


def test_the_callers_generators_are_untouched(folder):
    dataset, before = cached_views(folder), states()
    dataset[View(0, 0, 0)]
    assert states() == before


def epochs_of(folder, num_workers):
    dataset = cached_views(folder)
    sampler = ViewSampler(dataset, shuffle=True, seed=3)
    loader = DataLoader(
        dataset,
        batch_size=25,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=list,
        persistent_workers=num_workers > 0,
    )
    found = []
    for epoch in range(VIEWS + 1):
        sampler.set_epoch(epoch)
        found += [
            (item['inputs'].flatten().tolist(), item['data_samples'].teacher_answer)
            for batch in loader
            for item in batch
        ]
    return found


def test_workers_read_the_same(folder):
    alone = epochs_of(folder, 0)
    assert len(alone) == 100 * (VIEWS + 1)
    assert epochs_of(folder, 2) == alone


def test_a_plain_index_is_answered_without_a_record(folder):
    assert 'teacher_answer' not in cached_views(folder)[3]['data_samples']


def test_builds_from_a_config(folder):
    init_default_scope('mmpretrain')
    dataset = DATASETS.build(cached(live(None), folder).train_dataloader.dataset)
    assert type(dataset) is CachedViews and len(dataset) == 100


@pytest.mark.parametrize(
    'other, field',
    [
        (dict(indices=99), 'data.length is 100 in the cache and 99 here'),
        (dict(indices=200), 'data.length is 100 in the cache and 200 here'),
        (
            dict(split='test'),
            "data.config.split is 'train' in the cache and 'test' here.*data.images is.*data.labels is",
        ),
        (
            dict(pipeline=[dict(PIPELINE[0], padding=2), *PIPELINE[1:]]),
            'data.config.pipeline.0.padding is 1 in the cache and 2 here',
        ),
        (dict(pipeline=PIPELINE[1:]), 'data.config.pipeline is'),
    ],
    ids=['fewer', 'more', 'split', 'padding', 'transforms'],
)
def test_another_dataset_or_pipeline_is_refused(folder, other, field):
    with pytest.raises(CacheError, match=field):
        cached_views(folder, **other)


def test_a_pipeline_that_packs_no_sample(tmp_path, folder, monkeypatch):
    dataset = cached_views(folder)
    monkeypatch.setattr(dataset.dataset.pipeline, 'transforms', dataset.dataset.pipeline.transforms[:2])
    with pytest.raises(ValueError, match='end it with dict'):
        dataset[View(0, 0, 0)]


def test_damage_is_found_before_it_is_used(tmp_path):
    damaged = make_cache(tmp_path / 'cache', live(save_teacher(tmp_path / 'teacher.pth')), 1)
    content = bytearray((damaged / '0000-00000.npy').read_bytes())
    content[-53] ^= 4  # in the last image's answer
    (damaged / '0000-00000.npy').write_bytes(content)
    dataset = cached_views(damaged)
    dataset[View(98, 0, 0)]
    with pytest.raises(CacheError, match=r'0000-00000\.npy is damaged or of another cache \(answer 99\)'):
        dataset[View(99, 0, 0)]


class Drops(torch.nn.Module):
    """A transform that cannot read an image."""

    def forward(self, results):
        return None if results['sample_idx'] == 7 else results


@pytest.mark.parametrize(
    'image, change, message',
    [
        (
            7,
            lambda dataset: dataset.pipeline.transforms.insert(0, Drops()),
            'nothing for image 7, and mmengine replaced it by image',
        ),
        (5, lambda dataset: dataset.pipeline.transforms.insert(0, relabel), 'image 5 has class 3 here and class'),
    ],
    ids=['another image', 'another label'],
)
def test_answer_to_another_image_is_refused(folder, image, change, message):
    dataset = cached_views(folder)
    dataset[View(image, 0, 0)]
    change(dataset.dataset)
    with pytest.raises(CacheError, match=message):
        dataset[View(image, 0, 0)]


def relabel(results):
    return {**results, 'gt_label': 3}
