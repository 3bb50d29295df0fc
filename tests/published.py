"""The networks as others publish them, written down again from their definitions, shapes and keys.

``Weights`` makes up each tensor under its published key when a forward pass first asks for it.
"""

import torch
import torch.nn.functional as F


class Weights(dict):
    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, key, *shape, around=0.0, scale=1.0):
        if key not in self:
            self[key] = around + scale * torch.randn(*shape, generator=self.generator)
        return self[key]

    def conv(self, key, x, out, kernel=3, stride=1, groups=1, bias=False):
        fan_in = x.shape[1] // groups * kernel**2
        weight = self.draw(f'{key}.weight', out, x.shape[1] // groups, kernel, kernel, scale=(2 / fan_in) ** 0.5)
        offset = self.draw(f'{key}.bias', out, scale=0.1) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2, groups=groups)

    def bn(self, key, x):
        self.setdefault(f'{key}.num_batches_tracked', torch.tensor(7))
        mean, beta = (self.draw(f'{key}.{name}', x.shape[1], scale=0.1) for name in ('running_mean', 'bias'))
        variance, gamma = (
            self.draw(f'{key}.{name}', x.shape[1], around=1.0, scale=0.1).abs_() for name in ('running_var', 'weight')
        )
        return F.batch_norm(x, mean, variance, gamma, beta)

    def linear(self, key, x, classes=100):
        x = x.mean((2, 3)) if x.dim() == 4 else x
        weight = self.draw(f'{key}.weight', classes, x.shape[1], scale=x.shape[1] ** -0.5)
        return F.linear(x, weight, self.draw(f'{key}.bias', classes))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def resnet(w, x, blocks, stem, channels, kernels=(3, 3), shortcut='downsample', classifier='fc'):
    """Basic blocks with two kernels, bottlenecks with three, whose last has four times the channels."""
    x = w.bn('bn1', w.conv('conv1', x, stem)).relu()
    for stage, (depth, width) in enumerate(zip(blocks, channels), start=1):
        for index in range(depth):
            key, out, same = f'layer{stage}.{index}', x, x
            stride = 2 if stage > 1 and index == 0 else 1
            for number, kernel in enumerate(kernels, start=1):
                out = out if number == 1 else out.relu()
                wide = 4 if number == 3 else 1
                strides = stride if number == len(kernels) - 1 else 1
                out = w.bn(f'{key}.bn{number}', w.conv(f'{key}.conv{number}', out, wide * width, kernel, strides))
            if same.shape != out.shape and shortcut == 'pad':
                same = torch.zeros_like(out)
                same[:, width // 4 : -width // 4] = x[:, :, ::2, ::2]
            elif same.shape != out.shape:
                same = w.bn(f'{key}.{shortcut}.1', w.conv(f'{key}.{shortcut}.0', same, out.shape[1], 1, stride))
            x = (out + same).relu()
    return w.linear(classifier, x)


def resnet_of_weiaicunzai(w, x, blocks, kernels):
    x = w.bn('conv1.1', w.conv('conv1.0', x, 64)).relu()
    for stage, depth in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(depth):
            key, out, stride = f'conv{stage + 2}_x.{index}', x, 2 if stage and index == 0 else 1
            for place, kernel in enumerate(kernels):
                channels, strided = width * (4 if place == 2 else 1), stride if place == len(kernels) - 2 else 1
                out = w.conv(f'{key}.residual_function.{3 * place}', out, channels, kernel, strided)
                out = w.bn(f'{key}.residual_function.{3 * place + 1}', out)
                out = out.relu() if place < len(kernels) - 1 else out
            if x.shape != out.shape:
                x = w.bn(f'{key}.shortcut.1', w.conv(f'{key}.shortcut.0', x, out.shape[1], 1, stride))
            x = (out + x).relu()
    return w.linear('fc', x)


def wide_resnet(w, x, depth, widen):
    x = w.conv('conv1', x, 16)
    for stage in (1, 2, 3):
        for index in range((depth - 4) // 6):
            key, width = f'block{stage}.layer.{index}', 8 * widen * 2**stage
            stride = 2 if stage > 1 and index == 0 else 1
            active = w.bn(f'{key}.bn1', x).relu()
            out = w.bn(f'{key}.bn2', w.conv(f'{key}.conv1', active, width, 3, stride)).relu()
            same = x if x.shape[1] == width else w.conv(f'{key}.convShortcut', active, width, 1, stride)
            x = same + w.conv(f'{key}.conv2', out, width)
    return w.linear('fc', w.bn('bn1', x).relu())


def vgg(w, x, convs):
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        x = F.max_pool2d(x, 2) if stage in (1, 2, 3) else x
        for index in range(convs):
            key = f'block{stage}.{3 * index}', f'block{stage}.{3 * index + 1}'
            x = w.bn(key[1], w.conv(key[0], x, width, bias=True)).relu()
    return w.linear('classifier', x)


def mobilenet_v2_half(w, x):
    x = w.bn('conv1.1', w.conv('conv1.0', x, 16, 3, 2)).relu()
    settings = ((1, 8, 1, 1), (6, 12, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 2), (6, 160, 1, 1))
    for stage, (expansion, width, depth, stride) in enumerate(settings):
        for index in range(depth):
            key, hidden, strides = f'blocks.{stage}.{index}.conv', expansion * x.shape[1], stride if index == 0 else 1
            out = w.bn(f'{key}.1', w.conv(f'{key}.0', x, hidden, 1)).relu()
            out = w.bn(f'{key}.4', w.conv(f'{key}.3', out, hidden, 3, strides, hidden)).relu()
            out = w.bn(f'{key}.7', w.conv(f'{key}.6', out, width, 1))
            x = x + out if x.shape == out.shape else out
    return w.linear('classifier.0', w.bn('conv2.1', w.conv('conv2.0', x, 1280, 1)).relu())


def shufflenet_v1(w, x):
    x = w.bn('bn1', w.conv('conv1', x, 24, 1)).relu()
    for stage, (width, depth) in enumerate(((240, 4), (480, 8), (960, 4)), start=1):
        for index in range(depth):
            key, halves = f'layer{stage}.{index}', index == 0
            new = width - x.shape[1] if halves else width
            groups = 1 if x.shape[1] == 24 else 3
            out = shuffle(w.bn(f'{key}.bn1', w.conv(f'{key}.conv1', x, new // 4, 1, groups=groups)).relu(), groups)
            out = w.bn(f'{key}.bn2', w.conv(f'{key}.conv2', out, new // 4, 3, 2 if halves else 1, new // 4)).relu()
            out = w.bn(f'{key}.bn3', w.conv(f'{key}.conv3', out, new, 1, groups=3))
            x = (torch.cat([out, F.avg_pool2d(x, 3, 2, 1)], 1) if halves else out + x).relu()
    return w.linear('linear', x)


def shufflenet_v2(w, x):
    x = w.bn('bn1', w.conv('conv1', x, 24, 1)).relu()
    for stage, (width, depth) in enumerate(((116, 4), (232, 8), (464, 4)), start=1):
        for index in range(depth):
            key, half, c = f'layer{stage}.{index}', width // 2, x.shape[1]
            if index == 0:
                left = w.bn(f'{key}.bn1', w.conv(f'{key}.conv1', x, c, 3, 2, c))
                left = w.bn(f'{key}.bn2', w.conv(f'{key}.conv2', left, half, 1)).relu()
                right, first, stride = x, 3, 2
            else:
                left, right, first, stride = x[:, :half], x[:, half:], 1, 1
            right = w.bn(f'{key}.bn{first}', w.conv(f'{key}.conv{first}', right, half, 1)).relu()
            right = w.bn(f'{key}.bn{first + 1}', w.conv(f'{key}.conv{first + 1}', right, half, 3, stride, half))
            right = w.bn(f'{key}.bn{first + 2}', w.conv(f'{key}.conv{first + 2}', right, half, 1)).relu()
            x = shuffle(torch.cat([left, right], 1), 2)
    return w.linear('linear', w.bn('bn2', w.conv('conv2', x, 1024, 1)).relu())


def vgg_in_one_row(w, x, stages, hidden):
    """As torchvision counts: convolution, norm, activation and pool each have a number."""
    place = 0
    for width, depth in zip((64, 128, 256, 512, 512), stages):
        for _ in range(depth):
            x = w.bn(f'features.{place + 1}', w.conv(f'features.{place}', x, width, bias=True)).relu()
            place += 3
        x, place = F.max_pool2d(x, 2), place + 1
    if not hidden:
        return w.linear('classifier', x, 10)
    x = w.linear('classifier.0', x, hidden).relu()
    return w.linear('classifier.6', w.linear('classifier.3', x, hidden).relu())


def round_to_eight(channels):
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def mobilenet_v2(w, x, factor):
    """Of chenyaofo: stride 2 in the third, fourth and sixth stage alone."""

    def relu6(y):
        return y.clamp(0, 6)

    x = relu6(w.bn('features.0.1', w.conv('features.0.0', x, round_to_eight(32 * factor))))
    number = 1
    for expansion, width, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(depth):
            key, out, hidden, place = f'features.{number}.conv', x, expansion * x.shape[1], 0
            if expansion > 1:
                out = relu6(w.bn(f'{key}.0.1', w.conv(f'{key}.0.0', out, hidden, 1)))
                place = 1
            out = w.conv(f'{key}.{place}.0', out, hidden, 3, 1 if index else stride, hidden)
            out = relu6(w.bn(f'{key}.{place}.1', out))
            out = w.bn(f'{key}.{place + 2}', w.conv(f'{key}.{place + 1}', out, round_to_eight(width * factor), 1))
            x = x + out if x.shape == out.shape else out
            number += 1
    x = relu6(w.bn('features.18.1', w.conv('features.18.0', x, round_to_eight(1280 * max(1.0, factor)), 1)))
    return w.linear('classifier.1', x)


def shufflenet_v2_of_torchvision(w, x, widths):
    """Of chenyaofo: the stem keeps the resolution, and nothing is pooled behind it."""
    x = w.bn('conv1.1', w.conv('conv1.0', x, 24)).relu()
    for stage, (width, depth) in enumerate(zip(widths, (4, 8, 4)), start=2):
        for index in range(depth):
            key, half, stride = f'stage{stage}.{index}', width // 2, 1 if index else 2
            left, right = x.chunk(2, 1) if index else (x, x)
            if not index:
                left = w.bn(f'{key}.branch1.1', w.conv(f'{key}.branch1.0', left, left.shape[1], 3, 2, left.shape[1]))
                left = w.bn(f'{key}.branch1.3', w.conv(f'{key}.branch1.2', left, half, 1)).relu()
            right = w.bn(f'{key}.branch2.1', w.conv(f'{key}.branch2.0', right, half, 1)).relu()
            right = w.bn(f'{key}.branch2.4', w.conv(f'{key}.branch2.3', right, half, 3, stride, half))
            right = w.bn(f'{key}.branch2.6', w.conv(f'{key}.branch2.5', right, half, 1)).relu()
            x = shuffle(torch.cat([left, right], 1), 2)
    return w.linear('fc', w.bn('conv5.1', w.conv('conv5.0', x, 1024, 1)).relu())


def repvgg(w, x, blocks, widths, classes=100):
    def block(key, x, width, stride):
        out = sum(
            w.bn(f'{key}.{name}.bn', w.conv(f'{key}.{name}.conv', x, width, kernel, stride))
            for name, kernel in (('rbr_dense', 3), ('rbr_1x1', 1))
        )
        return (out + w.bn(f'{key}.rbr_identity', x) if x.shape == out.shape else out).relu()

    x = block('stage0', x, min(64, widths[0]), 1)
    for stage, (depth, width) in enumerate(zip(blocks, widths), start=1):
        for index in range(depth):
            x = block(f'stage{stage}.{index}', x, width, 2 if stage > 1 and index == 0 else 1)
    return w.linear('linear', x, classes)


# by the short names of the configs
NETWORKS = {
    'r20': ('ResNet (', lambda w, x: resnet(w, x, (3, 3, 3), 16, (16, 32, 64))),
    'r110': ('ResNet (', lambda w, x: resnet(w, x, (18, 18, 18), 16, (16, 32, 64))),
    'r8x4': ('ResNet (', lambda w, x: resnet(w, x, (1, 1, 1), 32, (64, 128, 256))),
    'r50': (
        'ResNet (kuangliu, akamaster; ResNet50',
        lambda w, x: resnet(w, x, (3, 4, 6, 3), 64, (64, 128, 256, 512), (1, 3, 1), 'shortcut', 'linear'),
    ),
    'wrn16-2': ('WideResNet', lambda w, x: wide_resnet(w, x, 16, 2)),
    'wrn40-1': ('WideResNet', lambda w, x: wide_resnet(w, x, 40, 1)),
    'wrn40-2': ('WideResNet', lambda w, x: wide_resnet(w, x, 40, 2)),
    'vgg8': ('VGG-8', lambda w, x: vgg(w, x, 1)),
    'vgg13': ('VGG-13', lambda w, x: vgg(w, x, 2)),
    'mbv2': ('MobileNetV2', mobilenet_v2_half),
    'sv1': ('ShuffleNetV1', shufflenet_v1),
    'sv2': ('ShuffleNetV2', shufflenet_v2),
}
# those without a config: layout, network here, and forward pass
ELSEWHERE = {
    'akamaster ResNet-20, option A': (
        'ResNet (kuangliu, akamaster',
        'CIFARResNet',
        lambda w, x: resnet(w, x, (3, 3, 3), 16, (16, 32, 64), shortcut='pad', classifier='linear'),
    ),
    'kuangliu ResNet-18': (
        'ResNet (kuangliu',
        'ResNet_CIFAR',
        lambda w, x: resnet(w, x, (2, 2, 2, 2), 64, (64, 128, 256, 512), shortcut='shortcut', classifier='linear'),
    ),
    'weiaicunzai ResNet-18': (
        'ResNet (weiaicunzai',
        'ResNet_CIFAR',
        lambda w, x: resnet_of_weiaicunzai(w, x, (2, 2, 2, 2), (3, 3)),
    ),
    'weiaicunzai ResNet-50': (
        'ResNet (weiaicunzai',
        'ResNet_CIFAR',
        lambda w, x: resnet_of_weiaicunzai(w, x, (3, 4, 6, 3), (1, 3, 1)),
    ),
    'chenyaofo VGG-16': ('VGG (chenyaofo', 'VGG', lambda w, x: vgg_in_one_row(w, x, (2, 2, 3, 3, 3), 512)),
    'kuangliu VGG-11': ('VGG (chenyaofo, kuangliu', 'VGG', lambda w, x: vgg_in_one_row(w, x, (1, 1, 2, 2, 2), 0)),
    'chenyaofo MobileNetV2 x0.75': (
        'MobileNetV2 (chenyaofo',
        'SmallImageMobileNetV2',
        lambda w, x: mobilenet_v2(w, x, 0.75),
    ),
    'chenyaofo MobileNetV2 x1.4': (
        'MobileNetV2 (chenyaofo',
        'SmallImageMobileNetV2',
        lambda w, x: mobilenet_v2(w, x, 1.4),
    ),
    'chenyaofo ShuffleNetV2 x0.5': (
        'ShuffleNetV2 (chenyaofo',
        'SmallImageShuffleNetV2',
        lambda w, x: shufflenet_v2_of_torchvision(w, x, (48, 96, 192)),
    ),
    'chenyaofo RepVGG-A0': (
        'RepVGG',
        'SmallImageRepVGG',
        lambda w, x: repvgg(w, x, (2, 4, 14, 1), (48, 96, 192, 1280)),
    ),
}
