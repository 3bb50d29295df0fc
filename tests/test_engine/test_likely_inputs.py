import pytest
import torch
from mmpretrain.models.utils import ClsDataPreprocessor

from mmwsl.engine.likely_inputs import better_input

MEAN, STD = torch.tensor([100.0, 110, 120]).view(3, 1, 1), torch.tensor([50.0, 60, 70]).view(3, 1, 1)


def images(count=128):
    """Pixels whose class is that of the brightest channel."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(3, (count,), generator=generator)
    pixels = torch.full((count, 3, 2, 2), 50.0)
    pixels[torch.arange(count), target] = 200.0
    return pixels, target


def brightest(normalise):
    """A teacher that is right where pixels were normalised as it knows them."""
    expected = normalise(images()[0])

    def network(inputs):
        known = (inputs - expected).abs().amax((1, 2, 3)) < 1e-3
        right = torch.nn.functional.one_hot(images()[1], 3).float()
        return torch.where(known.unsqueeze(1), right, right.roll(1, 1))

    return network


@pytest.mark.parametrize(
    'normalise, name',
    [
        (lambda pixels: (pixels.flip(1) - MEAN) / STD, 'the other order of channels (to_rgb)'),
        (lambda pixels: pixels / 255, 'pixels / 255'),
        (lambda pixels: pixels / 127.5 - 1, 'pixels from -1 to 1'),
        (lambda pixels: pixels, 'pixels from 0 to 255'),
        (lambda pixels: pixels.flip(1) / 255, 'pixels / 255, in the other order of channels (to_rgb)'),
        (
            lambda pixels: (
                (pixels - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1))
                / torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
            ),
            "ImageNet's mean and std",
        ),
        (
            lambda pixels: pixels.flip(1) - torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1),
            "ImageNet's mean alone (Caffe), in the other order of channels (to_rgb)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_usual_mistake_is_found(normalise, name):
    pixels, target = images()
    preprocessor = ClsDataPreprocessor(mean=MEAN.flatten().tolist(), std=STD.flatten().tolist())
    found = better_input(brightest(normalise), 0.0, (pixels - MEAN) / STD, target, preprocessor)
    assert found == (name, 1.0)


@pytest.mark.parametrize('right, count, found', [(0.96, 128, False), (0.94, 1024, True), (0.75, 12, False)])
def test_only_what_is_clearly_better_counts(right, count, found):
    """Five points and three standard errors: of 0.94 and 1.0 among 1,024 they are 2.2 points, of 0.75 among 12 37."""
    pixels, target = images(count)
    preprocessor = ClsDataPreprocessor(mean=[0.0] * 3, std=[2.0] * 3)
    network = lambda inputs: torch.nn.functional.one_hot(target, 3).float()  # noqa: E731
    assert bool(better_input(network, right, pixels, target, preprocessor)) == found


def test_without_normalisation_nothing_is_tried():
    pixels, target = images(4)
    assert better_input(lambda inputs: 1 / 0, 0.0, pixels, target, ClsDataPreprocessor()) is None
