"""Segmentors of mmseg are wired by their type, and those without class scores of pixels are refused."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip('mmseg')

from mmengine.structures import PixelData
from mmseg.registry import MODELS as SEG_MODELS

from mmwsl.models.distillers.segmentors import Segmentor, check_head
from mmwsl.models.teachers import CachedTeacher
from tests.test_dense.scenes import PREPROCESSOR, batch, distillation, head, losses, segmentor
from tests.tiny import ROOT

pytestmark = pytest.mark.dense


def log_softmax(logits):
    largest = max(logits)
    total = math.log(sum(math.exp(z - largest) for z in logits)) + largest
    return [z - total for z in logits]


def reference(preds_S, preds_T, labels, tau=2.0, alpha=1.5, ignored=255):
    """The paper's loss in Python numbers, one pixel after the other."""
    values = []
    pixels = zip(
        *(logits.double().movedim(1, -1).flatten(0, -2).tolist() for logits in (preds_S, preds_T)),
        labels.flatten().tolist(),
    )
    for z_s, z_t, label in pixels:
        if label != ignored:
            loss_S, loss_T = -log_softmax(z_s)[label], -log_softmax(z_t)[label]
            soft = -sum(
                math.exp(p) * q
                for p, q in zip(log_softmax([z / tau for z in z_t]), log_softmax([z / tau for z in z_s]))
            )
            values.append((1 - math.exp(-loss_S / (loss_T + 1e-7))) * tau**2 * soft)
    return alpha * sum(values) / len(values)


def logits_of(network, inputs):
    """A network's own at their own resolution, in the mode that it trains in."""
    return network.decode_head.forward(network.extract_feat(inputs))


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('resolution', ['label', 'logits'])
def test_a_step_against_a_loop_over_pixels(resolution, align_corners):
    distiller = dict(
        type='mmwsl.WSLDistiller',
        resolution=resolution,
        distill_losses=dict(loss_wsl=dict(type='mmwsl.WSLLoss', tau=2.0, loss_weight=1.5)),
    )
    student = segmentor(decode_head=head(2, align_corners=align_corners))
    model = distillation(student, distiller=distiller)
    found = losses(model, batch())
    data = model.data_preprocessor(batch(), True)
    labels = torch.stack([sample.gt_sem_seg.data for sample in data['data_samples']])
    with torch.no_grad():
        preds_S, preds_T = logits_of(model.student, data['inputs']), logits_of(model.teacher, data['inputs'])
    if resolution == 'label':
        preds_S, preds_T = (
            F.interpolate(preds, (40, 40), mode='bilinear', align_corners=align_corners) for preds in (preds_S, preds_T)
        )
    else:
        assert preds_S.shape[2:] == (10, 10)
        labels = labels[:, :, ::4, ::4]  # the nearest pixel, as F.interpolate takes it
    assert 255 in labels
    assert found['distill.loss_wsl'].item() == pytest.approx(reference(preds_S, preds_T, labels), rel=1e-5)
    assert model.distiller.distill_losses['loss_wsl'].ignore_index == 255


def test_a_teacher_of_another_resolution_is_resized():
    found = Segmentor('a', 'b', 3, False, 255, 'label')
    preds_S, preds_T = torch.randn(1, 3, 8, 6), torch.randn(1, 3, 4, 3)
    labels = torch.randint(3, (1, 8, 6))
    matched = found.match(preds_S, preds_T, labels)
    assert matched['preds_S'] is preds_S and matched['gt_labels'] is labels
    torch.testing.assert_close(matched['preds_T'], F.interpolate(preds_T, (8, 6), mode='bilinear'))


def test_the_fast_teacher_answers():
    model = distillation()
    for _ in range(2):
        first = losses(model, batch())
    assert model.frozen_teacher._copy is not None
    plain = distillation(teacher_speed='plain')
    for key, value in losses(plain, batch()).items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-4)


CASCADE = dict(type='mmseg.CascadeEncoderDecoder', num_stages=2)


def ocr(base):
    second = head(base, type='OCRHead', ocr_channels=4)
    for key in ('num_convs', 'concat_input'):
        del second[key]
    return segmentor(base, decode_head=[head(base), second], **CASCADE)


@pytest.mark.parametrize(
    ('student', 'source'),
    [
        (
            segmentor(
                decode_head=head(loss_decode=[dict(type='CrossEntropyLoss'), dict(type='DiceLoss', loss_weight=0.5)])
            ),
            'decode_head.loss_decode.0',
        ),
        (segmentor(auxiliary_head=head()), 'decode_head.loss_decode'),
        (
            segmentor(decode_head=head(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=20))),
            'decode_head.loss_decode',
        ),
        (ocr(2), 'decode_head.1.loss_decode'),
    ],
    ids=['several losses', 'auxiliary head', 'OHEM', 'cascade'],
)
def test_other_heads_are_wired_alike(student, source):
    model = distillation(student)
    found = losses(model, batch())
    recorder = model.distiller.student_recorders.get_recorder('hard_loss')
    assert recorder.source == source
    assert found['distill.loss_wsl'] > 0
    sum(value for key, value in found.items() if 'loss' in key).backward()
    assert all(parameter.grad is not None for parameter in model.student.decode_head.parameters())


def test_a_cascade_teaches():
    teacher = ocr(4)
    model = distillation(teacher=teacher)
    found = losses(model, batch())
    data = model.data_preprocessor(batch(), True)
    with torch.no_grad():
        features = model.teacher.extract_feat(data['inputs'])
        first = model.teacher.decode_head[0].forward(features)
        preds_T = model.teacher.decode_head[1].forward(features, first)
        preds_S = logits_of(model.student, data['inputs'])
    labels = torch.stack([sample.gt_sem_seg.data for sample in data['data_samples']])
    preds_S, preds_T = (F.interpolate(preds, (40, 40), mode='bilinear') for preds in (preds_S, preds_T))
    assert found['distill.loss_wsl'].item() == pytest.approx(reference(preds_S, preds_T, labels), rel=1e-5)


# ---- which heads fit

ONE = dict(in_channels=16, in_index=3)
LEVELS = dict(in_channels=[4, 8, 16, 16], in_index=[0, 1, 2, 3])
FIT = {
    'ANNHead': dict(in_channels=[16, 16], in_index=[2, 3], project_channels=4),
    'APCHead': dict(**ONE, pool_scales=(1, 2)),
    'ASPPHead': dict(**ONE, dilations=(1, 2)),
    'CCHead': ONE,
    'DDRHead': dict(in_channels=16),
    'DMHead': dict(**ONE, filter_sizes=(1, 3)),
    'DNLHead': ONE,
    'DPTHead': dict(
        in_channels=[16] * 4,
        in_index=[0, 1, 2, 3],
        input_transform='multiple_select',
        embed_dims=16,
        post_process_channels=[4, 4, 8, 8],
    ),
    'DepthwiseSeparableASPPHead': dict(**ONE, dilations=(1, 2), c1_in_channels=4, c1_channels=4),
    'DepthwiseSeparableFCNHead': dict(**ONE, num_convs=1, channels=16),
    'EMAHead': dict(**ONE, ema_channels=8, num_bases=4, num_stages=1),
    'FCNHead': dict(**ONE, num_convs=1),
    'FPNHead': dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32]),
    'GCHead': ONE,
    'ISAHead': dict(**ONE, isa_channels=4, down_factor=(2, 2)),
    'LRASPPHead': dict(
        in_channels=[4, 8, 16], in_index=[0, 1, 2], branch_channels=(4, 8), input_transform='multiple_select'
    ),
    'LightHamHead': dict(**LEVELS, ham_channels=4, ham_kwargs=dict(MD_R=4)),
    'NLHead': ONE,
    'PIDHead': dict(in_channels=16, loss_decode=[dict(type='CrossEntropyLoss')] * 4),
    'PSAHead': dict(**ONE, mask_size=(7, 7)),
    'PSPHead': dict(**ONE, pool_scales=(1, 2)),
    'SETRMLAHead': dict(in_channels=[16] * 4, in_index=[0, 1, 2, 3], mla_channels=2),
    'SETRUPHead': dict(**ONE, norm_layer=dict(type='LN', eps=1e-6)),
    'SegformerHead': LEVELS,
    'UPerHead': dict(**LEVELS, pool_scales=(1, 2)),
}
"""Heads that fit, with what the smallest of each needs."""
SEVERAL_OUTPUTS = {'DAHead': dict(**ONE, pam_channels=4), 'EncHead': dict(in_channels=[16], in_index=[3], num_codes=4)}
"""Of those that fit, heads that return more than the logits: the first is theirs."""
FIT |= SEVERAL_OUTPUTS
REFUSED = {
    'PointHead': 'on a few points',
    'SegmenterMaskTransformerHead': 'normalised once more',
    'STDCHead': 'edges',
    'MaskFormerHead': 'masks with a class',
    'Mask2FormerHead': 'masks with a class',
    'SideAdapterCLIPHead': 'masks',
    'VPDDepthHead': 'depths',
    'IterativeDecodeHead': 'each of its stages',
}


@pytest.mark.parametrize('name', FIT)
def test_the_logits_of_a_head_that_fits_are_what_its_last_layer_outputs(name):
    config = dict(
        type=name, channels=8, dropout_ratio=0.1, num_classes=5, align_corners=False, norm_cfg=dict(type='BN')
    )
    built = SEG_MODELS.build({**config, **FIT[name], '_scope_': 'mmseg'})
    check_head('student', built)
    if name == 'PSAHead':  # its operator is compiled
        built.psamask_collect = built.psamask_distribute = FourthsOfAMask()
    found = []
    built.conv_seg.register_forward_hook(lambda module, args, output: found.append(output))
    expected = built.eval().forward(features_for(name))
    expected = expected[0] if name in SEVERAL_OUTPUTS else expected
    torch.testing.assert_close(found[0], expected)


class FourthsOfAMask(nn.Module):
    """In place of an operator: of the shape that it returns for 2 x 2 positions."""

    def forward(self, mask):
        return mask[:, :4]


def features_for(name):
    """What a backbone hands to a head."""
    widths = [16] * 4 if name in ('FPNHead', 'SETRMLAHead', 'DPTHead') else [4, 8, 16, 16]
    side = 208 if name == 'LRASPPHead' else 16  # it averages over 49 x 49
    features = [torch.randn(2, width, side // scale, side // scale) for width, scale in zip(widths, (1, 2, 4, 4))]
    if name in ('DDRHead', 'PIDHead'):  # one level in a test, several in training
        return features[-1]
    if name == 'DPTHead':  # tokens of a transformer in a grid, and its class token
        return [(torch.randn(2, 16, 4, 4), torch.randn(2, 16)) for _ in range(4)]
    return [torch.randn(2, 16, 4, 4) for _ in range(4)] if name == 'SETRMLAHead' else features


def test_the_page_has_the_table():
    page = (ROOT / 'docs/dense.md').read_text().partition('| decode head | fits |')[2].partition('## ')[0]
    rows = [line.split('|')[1:-1] for line in page.splitlines() if line.startswith('| `')]
    table = {name: verdict.strip() for names, verdict in rows for name in re.findall(r'`(\w+)`', names)}
    assert {name for name, verdict in table.items() if verdict.startswith('yes')} >= {*FIT, 'OCRHead'}
    assert all(REFUSED[name] in table[name] for name in REFUSED)


@pytest.mark.parametrize('name', REFUSED)
def test_heads_without_class_scores_of_pixels_are_refused_with_the_reason(name):
    kind = SEG_MODELS.get(name)
    assert kind is not None
    with pytest.raises(ValueError, match=f'the student has a {name}, and .*{REFUSED[name]}.*Use another decode_head'):
        check_head('student', kind.__new__(kind))


def test_one_sigmoid_for_two_classes_is_refused():
    student = segmentor(
        decode_head=head(
            num_classes=2, out_channels=1, threshold=0.3, loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=True)
        )
    )
    with pytest.raises(ValueError, match=r'the student has a FCNHead, and it has 1 output channel\(s\) for 2 classes'):
        distillation(student)


def test_another_number_of_classes_is_named():
    with pytest.raises(ValueError, match='the teacher predicts 7 classes and the student 11'):
        distillation(teacher=segmentor(4, decode_head=head(4, num_classes=7)))


def test_a_loss_of_sigmoids_and_a_file_of_losses_are_refused():
    def wired(loss):
        return distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_x=loss)))

    with pytest.raises(ValueError, match='loss_x: BernoulliKD is not defined for .*FCNHead, whose classes exclude'):
        wired(dict(type='mmwsl.WeightedLoss', loss=dict(type='BernoulliKD')))
    with pytest.raises(ValueError, match="resolution should be one of .*got 'half'"):
        distillation(distiller=dict(type='mmwsl.WSLDistiller', resolution='half'))


@pytest.mark.parametrize('name', SEVERAL_OUTPUTS)
def test_a_teacher_whose_head_outputs_more_than_logits_teaches_by_them(name):
    settings = (
        dict(in_channels=[16], in_index=[0], num_codes=4)
        if name == 'EncHead'
        else dict(in_channels=16, in_index=0, pam_channels=4)
    )
    teacher = segmentor(
        4,
        decode_head=dict(
            type=name, channels=8, num_classes=11, align_corners=False, norm_cfg=dict(type='BN'), **settings
        ),
    )
    model = distillation(teacher=teacher)
    found = losses(model, batch())
    data = model.data_preprocessor(batch(), True)
    with torch.no_grad():
        preds_S, preds_T = logits_of(model.student, data['inputs']), logits_of(model.teacher, data['inputs'])[0]
    labels = torch.stack([sample.gt_sem_seg.data for sample in data['data_samples']])
    preds_S, preds_T = (F.interpolate(preds, (40, 40), mode='bilinear') for preds in (preds_S, preds_T))
    assert found['distill.loss_wsl'].item() == pytest.approx(reference(preds_S, preds_T, labels), rel=1e-5)


CE = dict(type='CrossEntropyLoss')


def branched(name, **kwargs):
    """A network whose head has a loss for each of its branches."""
    backbone = dict(type=name.replace('Head', 'Net'), channels=4, ppm_channels=4)
    if name == 'PIDHead':
        backbone |= dict(num_stem_blocks=1, num_branch_blocks=1)
    decode_head = dict(type=name, in_channels=16, channels=4, num_classes=11, align_corners=True, **kwargs)
    return segmentor(backbone=backbone, decode_head=decode_head)


@pytest.mark.parametrize(
    ('name', 'branch_losses'),
    [
        ('PIDHead', [CE, CE, dict(type='BoundaryLoss'), dict(type='OhemCrossEntropy', thres=0.9, min_kept=10)]),
        ('DDRHead', [CE, CE]),
    ],
    ids=['PIDHead', 'DDRHead'],
)
def test_of_several_branches_the_one_that_predicts_is_compared(name, branch_losses):
    model = distillation(
        branched(name, loss_decode=branch_losses),
        data_preprocessor=dict(PREPROCESSOR, size=(64, 64)),
    )
    data = batch(2, size=64)
    for sample in data['data_samples']:
        labels = sample.gt_sem_seg.data
        sample.gt_sem_seg.data = labels.masked_fill(labels == 255, 0)  # these heads ask their losses to know of 255
        sample.gt_edge_map = PixelData(data=(sample.gt_sem_seg.data > 0).long())
    predicted = []
    model.student.decode_head.conv_seg.register_forward_hook(lambda *args: predicted.append(args[2].detach()))
    found = losses(model, data)
    data = model.data_preprocessor(data, True)
    with torch.no_grad():
        preds_T = logits_of(model.teacher, data['inputs'])
    labels = torch.stack([sample.gt_sem_seg.data for sample in data['data_samples']])
    preds_S, preds_T = (
        F.interpolate(preds, (64, 64), mode='bilinear', align_corners=True) for preds in (predicted[0], preds_T)
    )
    assert found['distill.loss_wsl'].item() == pytest.approx(reference(preds_S, preds_T, labels), rel=1e-4)


# ---- several processes


def test_a_cached_teacher_is_refused_when_the_model_is_built():
    model = distillation()
    with pytest.raises(ValueError, match='a teacher cache holds one answer for each image, and segmentors'):
        model.distiller.prepare_from_teacher(CachedTeacher.__new__(CachedTeacher))


def gradients(model, data, scale=1.0):
    """Of the student's weights by what is distilled; its BatchNorm predicts with fixed statistics."""
    model.student.eval()
    data = model.data_preprocessor(data, True)
    found = model(data['inputs'].double(), data['data_samples'], mode='loss')
    (scale * found['distill.loss_wsl']).backward()
    return {name: value.grad for name, value in model.student.named_parameters()}


def in_float64(average):
    loss = dict(
        type='mmwsl.WeightedLoss',
        loss=dict(type='SoftCrossEntropy', tau=2.0),
        weighting=dict(type='WSLWeighting'),
        sync_divisor=average,
    )
    return distillation(distiller=dict(type='mmwsl.WSLDistiller', distill_losses=dict(loss_wsl=loss))).double()


def part_of_batch(rank, folder):
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    data = {key: values[rank:3:2] for key, values in batch(3).items()}  # two scenes here and one there
    found = gradients(in_float64(True), data, 0.5)  # as DistributedDataParallel takes the mean
    torch.save(found, f'{folder}/{rank}.pth')
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.start_processes(part_of_batch, (str(tmp_path),), 2, start_method='fork')
    parts = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    whole = gradients(in_float64(False), batch(3))
    assert any(value is not None and value.abs().sum() > 0 for value in whole.values())
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-9, atol=1e-12)
