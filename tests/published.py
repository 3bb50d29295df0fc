"""The networks as RepDistiller and mdistiller publish them, written down again from their shapes and keys.

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
        weight = self.draw(f'{key}.weight', out, x.shape[1] // groups, kernel, kernel, scale=(2 / fan_in)**0.5)
        offset = self.draw(f'{key}.bias', out, scale=0.1) if bias else None
        return F.conv2d(x, weight, offset, stride, kernel // 2, groups=groups)

    def bn(self, key, x):
        self.setdefault(f'{key}.num_batches_tracked', torch.tensor(7))
        mean, beta = (self.draw(f'{key}.{name}', x.shape[1], scale=0.1) for name in ('running_mean', 'bias'))
        variance, gamma = (self.draw(f'{key}.{name}', x.shape[1], around=1.0, scale=0.1).abs_()
                           for name in ('running_var', 'weight'))
        return F.batch_norm(x, mean, variance, gamma, beta)

    def linear(self, key, x, classes=100):
        x = x.mean((2, 3))
        weight = self.draw(f'{key}.weight', classes, x.shape[1], scale=x.shape[1]**-0.5)
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
            if same.shape != out.shape:
                same = w.bn(f'{key}.{shortcut}.1', w.conv(f'{key}.{shortcut}.0', same, out.shape[1], 1, stride))
            x = (out + same).relu()
    return w.linear(classifier, x)


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


# by the short names of the configs
NETWORKS = {
    'r20': ('ResNet (', lambda w, x: resnet(w, x, (3, 3, 3), 16, (16, 32, 64))),
    'r110': ('ResNet (', lambda w, x: resnet(w, x, (18, 18, 18), 16, (16, 32, 64))),
    'r8x4': ('ResNet (', lambda w, x: resnet(w, x, (1, 1, 1), 32, (64, 128, 256))),
    'r50': ('ResNet50', lambda w, x: resnet(w, x, (3, 4, 6, 3), 64, (64, 128, 256, 512), (1, 3, 1), 'shortcut',
                                            'linear')),
    'wrn16-2': ('WideResNet', lambda w, x: wide_resnet(w, x, 16, 2)),
    'wrn40-1': ('WideResNet', lambda w, x: wide_resnet(w, x, 40, 1)),
    'wrn40-2': ('WideResNet', lambda w, x: wide_resnet(w, x, 40, 2)),
    'vgg8': ('VGG-8', lambda w, x: vgg(w, x, 1)),
    'vgg13': ('VGG-13', lambda w, x: vgg(w, x, 2)),
    'mbv2': ('MobileNetV2', mobilenet_v2_half),
    'sv1': ('ShuffleNetV1', shufflenet_v1),
    'sv2': ('ShuffleNetV2', shufflenet_v2),
}
