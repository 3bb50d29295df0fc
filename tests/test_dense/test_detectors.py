"""Dense detectors of mmdet are wired by their type, and those without comparable class scores are refused."""

import math
import re

import pytest
import torch

pytest.importorskip('mmdet')

from mmdet.registry import MODELS as DET_MODELS

from mmwsl.models.distillers.detectors import _NOT_COMPARABLE, HEADS, check_head
from tests.test_dense.detectors import DETECTORS, PREPROCESSOR, batch, detector, distillation, losses, two_stages
from tests.tiny import ROOT

pytestmark = pytest.mark.dense
CLASSES = 10


def bce(z, y):
    return y * math.log1p(math.exp(-z)) + (1 - y) * math.log1p(math.exp(z))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def decision(z_s, z_t, y, factor=True):
    """The weighted soft loss of one class at one anchor, tau 1."""
    weight = 1 - math.exp(-bce(z_s, y) / (bce(z_t, y) + 1e-7))
    return weight * (abs(sigmoid(z_s) - sigmoid(z_t)) if factor else 1) * bce(z_s, sigmoid(z_t))


class Targets:
    """Listens to what a head's loss is told of each anchor: (label, quality, weight), level by level."""

    def __init__(self, head):
        self.told = []
        head.loss_cls.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        given = {**dict(zip(('scores', 'target', 'weight'), args)), **kwargs}
        labels, quality = given['target'] if isinstance(given['target'], tuple) else (given['target'], None)
        quality = torch.ones(labels.shape) if quality is None else quality
        weight = given.get('weight')
        weight = torch.ones(labels.shape) if weight is None else weight
        self.told += zip(labels.tolist(), quality.tolist(), weight.tolist())


def anchors(network, inputs, scores):
    """Logits of one anchor after the other: by level, image, row, column and anchor of the place."""
    with torch.no_grad():
        levels = network.bbox_head(network.extract_feat(inputs))[0]
    for level in levels:
        for image in level.double().tolist():
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    for a in range(len(image) // scores):
                        yield [image[a * scores + c][y][x] for c in range(scores)]


def step(student, **kwargs):
    """Losses of a step, what its head was told, and the logits of both networks."""
    model = distillation(student, **kwargs)
    targets = Targets(model.student.bbox_head)
    found = losses(model, batch())
    inputs = model.data_preprocessor(batch(), True)['inputs']
    scores = model.student.bbox_head.cls_out_channels
    return (
        model,
        found,
        targets.told,
        [list(anchors(network, inputs, scores)) for network in (model.student, model.teacher)],
    )


@pytest.mark.parametrize('name', DETECTORS)
def test_a_step_against_a_loop_over_anchors_and_classes(name):
    model, found, told, (preds_S, preds_T) = step(detector(name), teacher=detector(name, 4))
    assert len(told) == len(preds_S) == len(preds_T) >= 256
    total, positives, share = 0.0, 0, 0.0
    for (label, quality, weight), z_s, z_t in zip(told, preds_S, preds_T, strict=True):
        if weight > 0:
            positives += label < CLASSES
            values = [decision(z_s[c], z_t[c], quality if c == label else 0.0) for c in range(CLASSES)]
            total += sum(values)
            share += sum(value for c, value in enumerate(values) if c != label or quality == 0)
    assert positives > 1
    assert found['distill.loss_wsl'].item() == pytest.approx(total / positives, rel=1e-4)
    assert found['distill.negative_share'].item() == pytest.approx(share / total, rel=1e-4)
    assert 0 < found['distill.wsl_weight_positive'] < 1
    sum(
        value if isinstance(value, torch.Tensor) else sum(value) for key, value in found.items() if 'loss' in key
    ).backward()
    assert all(parameter.grad is not None for parameter in model.student.backbone.parameters())
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


def log_softmax(logits):
    total = math.log(sum(math.exp(z) for z in logits))
    return [z - total for z in logits]


def softmax_decision(z_s, z_t, label, tau=1.0):
    """The weighted soft loss of a target with one class of several."""
    weight = 1 - math.exp(-log_softmax(z_s)[label] / log_softmax(z_t)[label])
    log_S, log_T = (log_softmax([z / tau for z in logits]) for logits in (z_s, z_t))
    return weight * tau**2 * -sum(math.exp(q) * p for p, q in zip(log_S, log_T))


def test_a_softmax_has_background_as_its_last_class():
    softmax = dict(loss_cls=dict(type='CrossEntropyLoss'))
    model, found, told, (preds_S, preds_T) = step(
        detector('RetinaHead', **softmax), teacher=detector('RetinaHead', 4, **softmax)
    )
    assert type(model.distiller.distill_losses['loss_wsl']).__name__ == 'WSLLoss'
    total, positives = 0.0, 0
    for (label, _, weight), z_s, z_t in zip(told, preds_S, preds_T, strict=True):
        if weight > 0:
            positives += label < CLASSES
            total += softmax_decision(z_s, z_t, label)
    assert len(z_s) == CLASSES + 1
    assert found['distill.loss_wsl'].item() == pytest.approx(total / positives, rel=1e-4)


def wired(loss, student=None, **kwargs):
    return distillation(student, distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_x=loss)), **kwargs)


BERNOULLI = dict(type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD'))


def test_the_divisor_is_the_positives_and_what_the_loss_names_stays():
    """A sum over 11 positives and their mean; without weights, each decision counts its cross-entropy."""
    _, found, told, (preds_S, preds_T) = step(
        detector(),
        distiller=dict(
            type='mmwsl.WSLDistiller',
            distill_losses=dict(loss_mean=BERNOULLI, loss_sum=dict(BERNOULLI, reduction='sum')),
        ),
    )
    assert sum(label < CLASSES for label, *_ in told) == 11
    total = sum(bce(z_s[c], sigmoid(z_t[c])) for z_s, z_t in zip(preds_S, preds_T) for c in range(CLASSES))
    assert found['distill.loss_sum'].item() == pytest.approx(total, rel=1e-4)
    assert found['distill.loss_mean'].item() == pytest.approx(total / 11, rel=1e-4)


def test_images_without_objects_teach_as_well():
    model = distillation()
    data = batch()
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    found = losses(model, data)
    assert 0 < found['distill.loss_wsl'] < math.inf and found['distill.negative_share'] == 1


def test_the_fast_teacher_answers_without_losses_or_targets():
    model = distillation()
    model.teacher.bbox_head.loss_by_feat = model.teacher.bbox_head.get_targets = None
    for _ in range(2):
        fast = losses(model, batch())
    assert model.frozen_teacher._copy is not None
    plain = losses(distillation(teacher_speed='plain'), batch())
    torch.testing.assert_close(fast['distill.loss_wsl'], plain['distill.loss_wsl'], rtol=1e-4, atol=1e-4)


def test_a_teacher_of_another_normalisation_sees_what_it_was_trained_with():
    """caffe to pytorch: other mean, std and order of channels; the second image is padded."""
    own = dict(type='mmdet.DetDataPreprocessor', mean=[103.5, 116.3, 123.7], std=[1.0] * 3, pad_size_divisor=8)
    shared = dict(own, mean=[123.7, 116.3, 103.5], std=[58.4, 57.1, 57.4], bgr_to_rgb=True)
    model = distillation(teacher=dict(detector(base=4), data_preprocessor=own), data_preprocessor=shared)
    data = batch()
    data['inputs'][1] = data['inputs'][1][:, :52, :44] + torch.tensor([0, 5, 9], dtype=torch.uint8).view(3, 1, 1)
    data['data_samples'][1].set_metainfo(dict(img_shape=(52, 44)))
    seen = []
    model.teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    losses(model, data)
    expected = DET_MODELS.build(own)(data, False)['inputs']
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-4)


def test_layers_alone_can_be_compared():
    """MMRazor's channel-wise distillation of features needs no class scores, so the heads may be any."""
    neck = dict(type='ModuleOutputs', source='neck')
    distiller = dict(
        type='mmwsl.WSLDistiller',
        distill_losses=dict(loss_cwd=dict(type='ChannelWiseDivergence')),
        student_recorders=dict(neck=neck),
        teacher_recorders=dict(neck=neck),
        loss_forward_mappings=dict(
            loss_cwd=dict(
                preds_S=dict(recorder='neck', from_student=True, data_idx=0),
                preds_T=dict(recorder='neck', from_student=False, data_idx=0),
            )
        ),
    )
    assert losses(distillation(teacher=detector('FCOSHead'), distiller=distiller), batch())['distill.loss_cwd'] > 0


def test_what_the_students_preprocessor_does_to_a_batch_is_done():
    pad = dict(type='mmdet.BatchFixedSizePad', size=(96, 72))
    student = dict(detector(), data_preprocessor=dict(PREPROCESSOR, batch_augments=[pad]))
    assert distillation(student).data_preprocessor(batch(), True)['inputs'].shape == (2, 3, 96, 72)
    with pytest.raises(ValueError, match='sets batch_augments .*of its data_preprocessor'):
        distillation(student, data_preprocessor=dict(PREPROCESSOR, batch_augments=[dict(pad, size=(96, 96))]))


# ---- which heads fit

REFUSED = {
    'YOLOXHead': 'positives alone',
    'YOLOV3Head': 'positives alone',
    'SSDHead': 'negatives that it mines',
    'YOLACTHead': 'negatives that it mines',
    'DETRHead': 'queries',
    'DINOHead': 'queries',
    'PAAHead': 'its own losses',
    'FreeAnchorRetinaHead': 'its own losses',
    'FSAFHead': 'its own losses',
    'AutoAssignHead': 'its own losses',
    'PISARetinaHead': 'its own losses',
    'TOODHead': 'probabilities',
    'VFNetHead': 'deformable convolution',
    'RepPointsHead': 'deformable convolution',
    'DDODHead': 'deformable convolution',
    'NASFCOSHead': 'deformable convolution',
    'FoveaHead': 'deformable convolution',
    'GARetinaHead': 'deformable convolution',
    'CornerHead': 'heat maps',
    'CenterNetHead': 'heat maps',
    'CenterNetUpdateHead': 'heat maps',
    'LDHead': 'KnowledgeDistillationSingleStageDetector',
    'ATSSVLFusionHead': 'boxes with text',
    'RPNHead': 'none of RetinaHead',
}


def test_the_page_has_the_table():
    page = (ROOT / 'docs/dense.md').read_text().partition('| bbox_head | fits |')[2]
    rows = [line.split('|')[1:-1] for line in page.splitlines() if line.startswith('| `')]
    table = {name: verdict.strip() for names, verdict in rows for name in re.findall(r'`(\w+)`', names)}
    assert {name for name, verdict in table.items() if verdict == 'yes'} == {*DETECTORS}
    assert {*HEADS} <= {*DETECTORS}  # and RTMDetSepBNHead, a RTMDetHead
    assert {name for name, verdict in table.items() if verdict != 'yes'} >= {*_NOT_COMPARABLE}
    assert all(REFUSED[name] in table[name] for name in REFUSED if name in table)


@pytest.mark.parametrize('name', REFUSED)
def test_heads_without_comparable_scores_are_refused_with_the_reason(name):
    kind = DET_MODELS.get(name)
    network = torch.nn.Module()
    network.__dict__['bbox_head'] = kind.__new__(kind)
    with pytest.raises(ValueError, match=f'the student has a {name}, and .*{REFUSED[name]}.*Use another bbox_head'):
        check_head('student', network)


def test_scores_that_are_probabilities_are_refused():
    with pytest.raises(ValueError, match=r'the teacher has a GFLHead, and its class scores are probabilities'):
        distillation(teacher=detector(loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, activated=True)))


def test_two_stages_are_refused_with_the_way():
    with pytest.raises(ValueError, match='the student, a FasterRCNN, has two stages, .*docs/dense.md has a config'):
        distillation(two_stages())


@pytest.mark.slow
def test_two_stages_with_shared_proposals():
    """By the config of the page."""
    page = (ROOT / 'docs/dense.md').read_text()
    written = re.search(r'distiller=dict\(\n +type=.mmwsl.WSLDistiller.,\n +student_recorders(.|\n)+?\)\)\)\n', page)
    distiller = eval(written[0].strip().removeprefix('distiller='))
    model = distillation(two_stages(), two_stages(4), distiller=distiller)
    seen = {}
    for who, network in (('S', model.student), ('T', model.teacher)):
        network.roi_head.bbox_roi_extractor.register_forward_pre_hook(
            lambda module, args, who=who: seen.update({f'boxes_{who}': args[1]})
        )
        network.roi_head.bbox_head.fc_cls.register_forward_hook(
            lambda module, args, output, who=who: seen.update({f'preds_{who}': output.double().tolist()})
        )
    model.student.roi_head.bbox_head.loss_cls.register_forward_pre_hook(
        lambda module, args: seen.update(labels=args[1].tolist())
    )
    found = losses(model, batch())
    torch.testing.assert_close(seen['boxes_S'], seen['boxes_T'], rtol=0, atol=0)
    assert len(seen['labels']) == 64 and min(seen['labels']) < CLASSES  # 32 proposals of each image
    total = sum(softmax_decision(*target, tau=2.0) for target in zip(seen['preds_S'], seen['preds_T'], seen['labels']))
    assert found['distill.loss_wsl'].item() == pytest.approx(total / 64, rel=1e-4)


GENERATOR = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[4, 8])


@pytest.mark.parametrize(
    ('teacher', 'words'),
    [
        (
            detector(classes=7),
            r'the teacher \(GFLHead\) predicts 7 classes, and the student \(GFLHead\) predicts 10 .*'
            r'both the same bbox_head.num_classes',
        ),
        (
            detector(anchor_generator=dict(GENERATOR, strides=[8, 16])),
            r'the strides \[8, 16\], and .* \[4, 8\].*strides',
        ),
        (
            detector('RetinaHead'),
            r'the teacher \(RetinaHead\) has 4 anchors, and the student \(GFLHead\) has 2 anchors',
        ),
        (
            detector(anchor_generator=dict(GENERATOR, octave_base_scale=5)),
            r'has the anchor \[-10.0, -10.0, 10.0, 10.0\] at the stride 4, and '
            r'.* \[-8.0, -8.0, 8.0, 8.0\] at the stride 4',
        ),
        (detector('FCOSHead'), r'the teacher \(FCOSHead\) has 1 anchors'),
        (
            detector('RetinaHead', loss_cls=dict(type='CrossEntropyLoss')),
            'has a softmax, and .* has sigmoids.*use_sigmoid',
        ),
    ],
    ids=['classes', 'strides', 'number of anchors', 'size of anchors', 'points', 'softmax'],
)
def test_a_teacher_of_other_classes_or_anchors_is_named(teacher, words):
    with pytest.raises(ValueError, match=words):
        distillation(teacher=teacher)


def test_a_teacher_with_other_levels_is_named():
    student, teacher = detector('RetinaHead'), detector('RetinaHead', 4)
    teacher['neck']['num_outs'] = 3
    model = distillation(student, teacher)
    with pytest.raises(
        ValueError, match=r'student has class scores of shape .* and the teacher of shape .*neck.num_outs'
    ):
        losses(model, batch())


def test_losses_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError,
        match='loss_x: SoftCrossEntropy is not defined for .*GFLHead, a sigmoid head. '
        'Use mmwsl.WeightedLoss with loss=.*BernoulliKD',
    ):
        wired(dict(type='mmwsl.WSLLoss'))
    softmax = [detector('RetinaHead', base, loss_cls=dict(type='CrossEntropyLoss')) for base in (2, 4)]
    with pytest.raises(ValueError, match='loss_x: BernoulliKD is not defined for .*RetinaHead, a softmax head'):
        wired(BERNOULLI, softmax[0], teacher=softmax[1])


# ---- several processes


def gradients(model, data, scale=1.0):
    """Of the student's weights by what is distilled; its BatchNorm predicts with fixed statistics."""
    model.student.eval()
    data = model.data_preprocessor(data, True)
    found = model(data['inputs'].double(), data['data_samples'], mode='loss')
    (scale * found['distill.loss_wsl']).backward()
    return {name: value.grad for name, value in model.student.named_parameters()}


def part_of_batch(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    data = {key: values[rank:3:2] for key, values in batch(3).items()}  # two scenes here and one there
    model = distillation(detector('FCOSHead'), detector('FCOSHead', 4)).double()
    torch.save(gradients(model, data, 0.5), f'{folder}/{rank}.pth')  # as DistributedDataParallel takes the mean
    torch.distributed.destroy_process_group()


def test_two_processes_with_unequal_positives_are_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(part_of_batch, (str(tmp_path),), 2, start_method='fork')
    parts = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    whole = gradients(distillation(detector('FCOSHead'), detector('FCOSHead', 4)).double(), batch(3))
    assert any(value is not None and value.abs().sum() > 0 for value in whole.values())
    for name, value in whole.items():
        if value is None:
            assert parts[0][name] is parts[1][name] is None
        else:
            torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-9, atol=1e-12)
