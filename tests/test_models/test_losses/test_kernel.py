"""The Triton kernels of the loss, shown in one of two ways; neither shows how fast they are.

*Run*: on CPU tensors, through Triton's interpreter (tests/conftest.py), or if there is a GPU, on it. The interpreter
computes exponentials and logarithms to the last bits, a GPU approximately. *Compiled*: for GPUs that are not there.
"""

import json
import math

import pytest
import torch

from mmwsl.models.losses import SoftCrossEntropy, WSLLoss
from tests.test_models.test_losses.test_wsl_loss import (
    SHAPES,
    TOLERANCES,
    Made,
    assert_near,
    example,
    gradient,
    reference,
)
from tests.tiny import tool

pytest.importorskip('triton', reason='needs the extra triton')

from mmwsl.models.losses import kernel

pytestmark = [
    pytest.mark.cuda,
    # of what the kernels compute at ignored targets and then leave out
    pytest.mark.filterwarnings('ignore:.* encountered in:RuntimeWarning'),
]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
if DEVICE == 'cpu':  # the interpreter cuts float32 off to bfloat16 where a GPU rounds
    TOLERANCES = {**TOLERANCES, torch.bfloat16: (TOLERANCES[torch.bfloat16][0], dict(rtol=8e-3, atol=1e-6))}
LONG = [(2, 2049), (3, 16385), (1, 300, 5)]  # rows that a program keeps, and two that it walks over in chunks


def on_device(preds_S, preds_T, target):
    preds_S, preds_T, target = (tensor.detach().to(DEVICE) for tensor in (preds_S, preds_T, target))
    return preds_S.requires_grad_(), preds_T, target


def loss_with_kernel(tau=2.0, loss_weight=2.5, **settings):
    return WSLLoss(tau, loss_weight, compile='triton', **settings)


@pytest.fixture
def launches(monkeypatch):
    """Numbers of programs that kernels are launched with, so that no test passes by another path."""
    grids, launch = [], kernel.launch

    def spied(*args):
        launched = launch(*args)
        grids.append(launched[0])
        return launched

    monkeypatch.setattr(kernel, 'launch', spied)
    return grids


# ---- run: against the reference in float64


@pytest.mark.parametrize(
    ('shape', 'tau'),
    [*((shape, tau) for shape in SHAPES for tau in (0.5, 2, 3)), *((shape, 3) for shape in LONG)],
    ids=str,
)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_values_and_gradients(shape, tau, dtype, launches):
    preds_S, preds_T, target = on_device(*example(shape, dtype, 'some ignored'))
    loss_tolerance, gradient_tolerance = TOLERANCES[dtype]
    expected = reference(preds_S.cpu(), preds_T.cpu(), target.cpu(), tau)
    loss = loss_with_kernel(tau, loss_weight=2.25)

    each = loss(preds_S, preds_T, target, reduction_override='none')
    assert each.dtype == torch.float32
    assert_near(each.flatten().cpu(), 2.25 * torch.tensor(expected.losses, dtype=torch.float64), **loss_tolerance)
    upstream = torch.linspace(-3, 2, each.numel(), device=DEVICE).view_as(each)
    found = gradient(each, preds_S, upstream)
    assert found.dtype == dtype
    assert_near(found.cpu(), 2.25 * upstream.cpu().double().unsqueeze(1) * expected.gradient, **gradient_tolerance)
    assert_near(loss.statistics['wsl_weight'].cpu(), math.fsum(expected.weights) / expected.count, **loss_tolerance)
    share = sum(expected.regularizing) / expected.count  # in float32 a near tie may come out the other way
    assert loss.statistics['regularization_share'].item() == pytest.approx(share, abs=1.1 / expected.count)
    assert len(launches) == (2 if target.numel() else 0)


@pytest.mark.parametrize('scale', [1.0, -1.5, 1024.0])
def test_the_mean_with_an_upstream_gradient(scale):
    preds_S, preds_T, target = on_device(*example((2, 5, 3), torch.float32, 'some ignored'))
    expected = reference(preds_S.cpu(), preds_T.cpu(), target.cpu(), 2.0)
    mean = loss_with_kernel()(preds_S, preds_T, target)
    assert_near(mean.cpu(), 2.5 * math.fsum(expected.losses) / expected.count, rtol=1e-5, atol=1e-6)
    for _ in range(2):  # a graph that is kept can be gone through again
        assert_near(
            gradient(scale * mean, preds_S).cpu(),
            scale * 2.5 * expected.gradient / expected.count,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize('weighting', ['one', 'drop_regularization', 'random'])
def test_other_weightings(weighting):
    inputs, settings = example((64, 5), torch.float32, 'some ignored'), dict(weighting=weighting)
    torch.manual_seed(0)
    expected = WSLLoss(**settings)(*inputs)
    torch.manual_seed(0)
    given = on_device(*inputs)
    loss = loss_with_kernel(**settings)(*given)
    if weighting == 'random' and DEVICE == 'cuda':
        pytest.skip('the device draws other numbers')
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(gradient(loss, given[0]).cpu(), gradient(expected, inputs[0]))


def test_a_teachers_loss_that_is_given_takes_the_place_of_the_kernels():
    inputs = example((8, 5), torch.float32, 'some ignored')
    given = torch.linspace(0.1, 2, 8)
    expected = WSLLoss()(*inputs, teacher_hard_loss=given)
    loss = loss_with_kernel()(*on_device(*inputs), teacher_hard_loss=given.to(DEVICE))
    torch.testing.assert_close(loss.cpu(), expected)


# ---- run: logits that are hard to compute with


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('tau', [0.5, 2.0, 4.0])
def test_logits_of_ten_thousand(dtype, tau):
    # As in test_wsl_loss: row 0 loses tau * 2e4 with a weight of 1, row 1 nothing.
    preds_S = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], dtype=dtype)
    preds_T = torch.tensor([[-1e4, 1e4], [-1e4, 1e4]], dtype=dtype)
    gap = (preds_S[0, 0] - preds_T[0, 0].double()).item()
    preds_S, preds_T, target = on_device(preds_S, preds_T, torch.tensor([1, 1]))
    loss = loss_with_kernel(tau, loss_weight=1.0, reduction='none')(preds_S, preds_T, target)
    assert loss.tolist() == [pytest.approx(tau * gap), 0]
    assert gradient(loss, preds_S, torch.ones_like(loss)).tolist() == [[tau, -tau], [0, 0]]


@pytest.mark.parametrize('margin_S', [0.0, 6.0, 15.0])
@pytest.mark.parametrize('margin_T', [10.0, 14.0, 19.0, 40.0])
def test_confident_networks_keep_the_weight(margin_S, margin_T):
    # L_s and L_t down to 1e-15, by the logarithm of a sum that is nearly 1
    preds_S, preds_T, target = example((64, 100), torch.float32)
    preds_S = preds_S.detach() / 2
    preds_S[torch.arange(64), target] += margin_S
    preds_T[torch.arange(64), target] += margin_T
    expected = reference(preds_S, preds_T, target, 2.0)
    loss = loss_with_kernel()
    loss(*on_device(preds_S, preds_T, target))
    assert_near(loss.sample_terms['w'].cpu(), expected.weights, rtol=3e-4, atol=1e-9)


@pytest.mark.parametrize('harm', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('shape', [(6, 5), (2, 5, 3), (6, 2049)], ids=str)
def test_what_is_not_finite_at_an_ignored_target_reaches_nothing(shape, harm):
    inputs = example(shape, torch.float32, 'some ignored')
    expected = WSLLoss()(*inputs)
    preds_S, preds_T, target = on_device(*inputs)
    ignored = (target == -100).unsqueeze(1)
    preds_S = preds_S.detach().masked_fill(ignored, harm).requires_grad_()
    loss = loss_with_kernel()
    value = loss(preds_S, preds_T.masked_fill(ignored, harm), target)
    torch.testing.assert_close(value.cpu(), expected)
    torch.testing.assert_close(gradient(value, preds_S).cpu(), gradient(expected, inputs[0]))
    assert not any(values.isnan().any() for values in loss.statistics.values())
    each = loss(preds_S, preds_T, target, reduction_override='none')
    assert not gradient(each, preds_S, torch.full_like(each, math.nan)).masked_select(ignored).any()


def test_no_target_kept():
    preds_S, preds_T, target = on_device(*example((8, 5), torch.float32))
    loss = loss_with_kernel()(preds_S, preds_T, torch.full_like(target, -100))
    assert loss == 0 and not gradient(loss, preds_S).any()


# ---- run: memory

STRIDED = {
    'transposed': lambda tensor: tensor.t().contiguous().t(),
    'sliced': lambda tensor: torch.stack((tensor, tensor + 1), 2)[..., 0],
    'columns of more': lambda tensor: torch.cat((tensor, tensor), 1)[:, : tensor.shape[1]],
    'not aligned': lambda tensor: torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape),
    'one for all': lambda tensor: tensor[:1].expand_as(tensor),
}
STRIDED_DENSE = {
    'channels last': lambda tensor: tensor.to(memory_format=torch.channels_last),
    'a crop': lambda tensor: torch.nn.functional.pad(tensor, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    'turned': lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize(
    ('shape', 'layout'), [*((((6, 16), name)) for name in STRIDED), *((((2, 5, 4, 3), name)) for name in STRIDED_DENSE)]
)
def test_every_layout_gives_the_same(shape, layout):
    laid_out = {**STRIDED, **STRIDED_DENSE}[layout]
    preds_S, preds_T, target = example(shape, torch.float32, 'some ignored')
    preds_S = laid_out(preds_S.detach())
    inputs = (preds_S.clone(memory_format=torch.contiguous_format).requires_grad_(), preds_T, target)
    expected = WSLLoss()(*inputs)
    for theirs in (preds_T, laid_out(preds_T) if layout != 'one for all' else preds_T):
        ours = (laid_out(preds_S.to(DEVICE)).detach().requires_grad_(), theirs.to(DEVICE), target.to(DEVICE))
        loss = loss_with_kernel()(*ours)
        torch.testing.assert_close(loss.cpu(), expected)
        found = gradient(loss, ours[0])
        torch.testing.assert_close(found.cpu(), gradient(expected, inputs[0]))
        assert layout not in ('transposed', 'channels last') or found.stride() == preds_S.stride()


def test_student_and_teacher_of_different_types():
    preds_S, preds_T, target = example((5, 7), torch.bfloat16)
    inputs = preds_S.detach().requires_grad_(), preds_T.float(), target
    ours = on_device(*inputs)
    loss, expected = loss_with_kernel()(*ours), WSLLoss()(*inputs)
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(gradient(loss, ours[0]).cpu(), gradient(expected, inputs[0]))


@pytest.mark.parametrize(('weighting', 'forward', 'backward'), [('wsl', 8, 4), ('one', 12, 5)])
def test_few_operations_and_one_tensor_of_the_logits_size(weighting, forward, backward):
    """Counted without values; backward's first is the 1 that it begins with."""
    preds_S = torch.empty(64, 100, device='meta', requires_grad=True)
    preds_T, target = torch.empty(64, 100, device='meta'), torch.empty(64, dtype=torch.int64, device='meta')
    with Made() as made:
        loss = loss_with_kernel(weighting=weighting)(preds_S, preds_T, target)
    assert len(made.tensors) == forward
    assert max(size for _, size in made.tensors) == 5 * 64  # the terms
    with Made() as made:
        loss.backward()
    assert len(made.tensors) == backward
    assert [name for name, size in made.tensors if size == 6400] == ['mmwsl::soft_gradient']


@pytest.mark.skipif(DEVICE == 'cuda', reason="counts the CPU's memory")
@pytest.mark.parametrize('shape', [(64, 100), (2, 19, 32, 32)], ids=str)
def test_the_gradient_is_all_that_is_allocated_of_the_logits_size(shape):
    preds_S, preds_T, target = example(shape, torch.float32)
    preds_S = preds_S.detach().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss_with_kernel()(preds_S, preds_T, target).backward()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    assert [size for size in events if size >= preds_S.numel() * 4] == [preds_S.numel() * 4]
    assert [size for size in events if size <= -preds_S.numel() * 4] == []


# ---- run: what calls it


def test_the_operations_do_as_they_declare():
    """Their stand-ins for tensors without memory have the results' shapes, types and strides."""
    preds_S, preds_T, target = on_device(*example((2, 5, 3), torch.bfloat16))
    checks = ('test_schema', 'test_faketensor')
    torch.library.opcheck(
        torch.ops.mmwsl.soft_terms.default, (preds_S.detach(), preds_T, target, 2.0, -100), test_utils=checks
    )
    upstream = torch.ones(2, 3, device=DEVICE)
    for logits in (preds_S.detach(), preds_S.detach().transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(
            torch.ops.mmwsl.soft_gradient.default, (logits, preds_T, target, upstream, 2.0, -100), test_utils=checks
        )


@pytest.mark.parametrize('weighting', ['wsl', 'one'])
@pytest.mark.parametrize('kind', ['indices', 'some ignored'])
def test_the_weighted_loss_is_one_graph(kind, weighting):
    preds_S, preds_T, target = on_device(*example((5, 7), torch.float32, kind))
    compiled = torch.compile(loss_with_kernel(weighting=weighting), backend='aot_eager', fullgraph=True)
    value, expected = compiled(preds_S, preds_T, target), WSLLoss(weighting=weighting)(preds_S, preds_T, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, preds_S), gradient(expected, preds_S))


def test_torch_compile_keeps_it_in_one_graph():
    preds_S, preds_T, target = on_device(*example((5, 7), torch.float32))
    loss = SoftCrossEntropy(2.0, compile='triton')
    compiled = torch.compile(loss, backend='aot_eager', fullgraph=True)
    value, expected = compiled(preds_S, preds_T, target), loss(preds_S, preds_T, target)
    torch.testing.assert_close(value, expected)
    upstream = torch.linspace(-1, 2, 5, device=DEVICE)
    torch.testing.assert_close(gradient(value, preds_S, upstream), gradient(expected, preds_S, upstream))


@pytest.mark.parametrize(('dtype', 'kind'), [(torch.float32, 'scores'), (torch.float64, 'indices')], ids=str)
def test_what_the_kernels_do_not_take_is_computed_otherwise(dtype, kind, launches):
    inputs = example((5, 7), dtype, kind)
    torch.testing.assert_close(loss_with_kernel()(*inputs), WSLLoss()(*inputs))
    assert launches == []


def test_a_second_derivative_is_refused():
    preds_S, preds_T, target = on_device(*example((3, 5), torch.float32))
    with pytest.raises(RuntimeError, match='only a first derivative'):
        torch.autograd.grad(loss_with_kernel()(preds_S, preds_T, target), preds_S, create_graph=True)


# ---- compiled

SIZES = ['64x100', '256x1000', '64x16384', '64x21841', '8x150x512x512', '8x1000x64x64']


@pytest.fixture(scope='module')
def resources():
    """Of each kernel on each GPU, compiled for it without running."""
    done = tool('benchmarks/kernel.py', '--arch', 80, 90, '--shapes', *SIZES)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


@pytest.mark.slow
def test_kernels_compile_for_gpus_without_spills(resources):
    assert len(resources) == len(SIZES) * 2 * 2 * 2  # types, GPUs, kernels
    assert all(row['asserts_classes'] for row in resources)  # which the interpreter does not
    assert not any(row['float64'] for row in resources)
    assert [row for row in resources if row['spill_stores'] or row['spill_loads']] == []
