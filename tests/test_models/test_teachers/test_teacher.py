"""The frozen teacher: what it says is what its network says, whatever happens to the network."""

import copy
import pickle

import pytest
import torch
from mmengine.model import BaseModel
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from mmrazor.models.task_modules.delivery import DistillDeliveryManager
from mmrazor.models.task_modules.recorder import RecorderManager
from torch import nn

from mmwsl.models.teachers import FrozenTeacher
from mmwsl.models.teachers import fast as fast_teacher
from mmwsl.models.teachers import teacher as frozen_teacher
from tests.tiny import build, network

INPUTS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def with_statistics(net):
    """Give BatchNorm statistics and weights that show where they are used."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return net


def taught(**kwargs):
    """A teacher in training that has answered once, and so has a fast copy."""
    teacher = FrozenTeacher(with_statistics(build(network(4))), **kwargs)
    teacher.train()
    teacher(INPUTS)
    assert teacher._copy is not None
    return teacher


def expected(teacher):
    with torch.no_grad():
        return teacher.network(INPUTS)


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


@pytest.fixture
def copies(monkeypatch):
    """The batches at which a fast copy was tried."""
    tried, make = [], fast_teacher.fast_forward
    monkeypatch.setattr(frozen_teacher, 'fast_forward', lambda *args: tried.append(args) or make(*args))
    return tried


def test_logits_are_the_networks_without_gradient():
    teacher = taught()
    logits = teacher(INPUTS)
    assert_same(logits, expected(teacher))
    assert not logits.requires_grad and not any(part.requires_grad for part in teacher.network.parameters())


def test_outside_training_the_network_itself_answers(copies):
    teacher = FrozenTeacher(with_statistics(build(network(4))), norm_eval=False)
    assert torch.equal(teacher(INPUTS), expected(teacher))
    assert not copies


# ---- a copy that is no longer true


def set_by_name(net):
    net.load_state_dict(
        {name: value + 1 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    )


def replace_a_layer(net):
    net.head.fc = nn.Linear(16, 10).requires_grad_(False)


def write_a_buffer(net):
    net.backbone.bn1.running_mean.add_(1)


def write_data(net):
    net.head.fc.weight.data.zero_()


def negate_data(net):
    net.head.fc.weight.data.neg_()


def point_elsewhere(net):
    net.head.fc.weight.data = net.head.fc.weight.data * 0.5


def drop_a_layer(net):
    net.head.fc = nn.Sequential(nn.Linear(16, 10), nn.ReLU()).requires_grad_(False)


def set_another_mode(net):
    net.backbone.bn1.track_running_stats = False
    net.backbone.bn1.train()


@pytest.mark.parametrize(
    'change',
    [
        set_by_name,
        replace_a_layer,
        write_a_buffer,
        write_data,
        negate_data,
        point_elsewhere,
        drop_a_layer,
        set_another_mode,
    ],
)
def test_the_step_after_a_change_is_taught_by_the_changed_network(change):
    teacher = taught()
    before = teacher(INPUTS)
    change(teacher.network)
    wanted = expected(teacher)
    assert (wanted - before).abs().max() > 1e-2 * before.abs().max()
    assert_same(teacher(INPUTS), wanted)
    assert_same(teacher(INPUTS), wanted)
    assert teacher._copy is not None  # which was made again


def test_a_teacher_that_changes_in_each_step_is_copied_once(copies):
    teacher = taught()
    for _ in range(5):
        with torch.no_grad():
            for weight in teacher.network.parameters():
                weight.mul_(0.9)
        assert torch.equal(teacher(INPUTS), expected(teacher))
    assert len(copies) == 1
    assert_same(teacher(INPUTS), expected(teacher))
    assert len(copies) == 2


def test_a_change_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr(frozen_teacher, 'print_log', lambda message, logger: said.append(message))
    teacher = taught()
    assert not said
    for _ in range(2):
        write_a_buffer(teacher.network)
        teacher(INPUTS), teacher(INPUTS)
    assert len(said) == 1 and said[0].startswith('The teacher has changed since its fast copy was made')


def test_training_goes_on_with_the_same_copy_after_validation(copies):
    teacher = taught(norm_eval=False)
    teacher.train(False)
    teacher(INPUTS)
    teacher.train()
    assert_same(teacher(INPUTS), expected(teacher))
    assert len(copies) == 1


@pytest.mark.parametrize('register', ['register_forward_hook', 'register_forward_pre_hook'])
@pytest.mark.parametrize('after', [0, 2], ids=['before the first step', 'later'])
def test_a_hook_of_somebody_else_is_called_in_each_step(register, after):
    teacher = FrozenTeacher(with_statistics(build(network(4))))
    teacher.train()
    for _ in range(after):
        teacher(INPUTS)
    calls, layer = [], teacher.network.backbone.layer2
    handle = getattr(layer, register)(lambda module, *_: calls.append(module))
    for _ in range(3):
        calls.clear()
        teacher(INPUTS)
        assert calls and all(module is layer for module in calls)  # of the network, not of a copy
    handle.remove()
    teacher(INPUTS), teacher(INPUTS)
    assert teacher._copy is not None


def test_a_hook_of_the_preprocessor_is_none_in_the_network():
    teacher = FrozenTeacher(with_statistics(build(network(4))))
    teacher.network.data_preprocessor.register_forward_hook(lambda *_: None)
    teacher.train()
    teacher(INPUTS)
    assert teacher._copy is not None


@pytest.mark.parametrize(
    'copied', [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))], ids=['deepcopy', 'pickle']
)
def test_copies_teach_by_themselves(copied):
    teacher = taught()
    twin = copied(teacher)
    assert twin._copy is None and twin.network is not teacher.network
    write_data(twin.network)
    assert_same(twin(INPUTS), expected(twin))
    assert_same(teacher(INPUTS), expected(teacher))


def test_what_is_no_network_of_mmengine_is_refused():
    with pytest.raises(TypeError, match=r"config or a BaseModel of mmengine, got <class '.*Linear'>"):
        FrozenTeacher(nn.Linear(2, 2))


# ---- what is read of it


class Dense(BaseModel):
    """Outputs a tree, as detectors and segmentors do."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.stem, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.scores, self.boxes = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 4, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        features = self.norm(self.stem(inputs))
        return self.form(self.scores(features), self.boxes(features).relu())


class Scaled(Dense):
    """Needs the samples, as two-stage detectors do."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return data_samples[0].scale * super().forward(inputs)


FORMS = {
    'tuple of lists': lambda scores, boxes: ([scores, scores[..., ::2]], [boxes, boxes[..., ::2]]),
    'dict': lambda scores, boxes: dict(scores=scores, boxes=boxes),
    'not all of floats': lambda scores, boxes: (scores, boxes[:0], boxes >= 0, torch.arange(3)),
}


def dense(form, speed='fold'):
    teacher = FrozenTeacher(with_statistics(Dense(FORMS[form])), speed=speed)
    recorders = RecorderManager(dict(output=dict(type='mmrazor.ModuleOutputs', source='')))
    recorders.initialize(teacher.network)
    teacher.is_read_by(recorders, DistillDeliveryManager())
    teacher.train()
    return teacher, recorders.get_recorder('output')


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('speed, tolerance', [('fold', 1e-4), ('bf16', 0.1)])
def test_trees_of_tensors_are_fast_too(form, speed, tolerance):
    teacher, recorder = dense(form, speed)
    wanted = expected(teacher)
    for _ in range(2):
        found = teacher(INPUTS)
        assert recorder.get_record_data() is found
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * 5)
    assert teacher._copy is not None


@pytest.mark.parametrize('part', ['scores', 'boxes'])
def test_each_tensor_of_a_tree_is_compared_by_itself(monkeypatch, part):
    """A copy that is wrong in the smaller of two outputs by 1 % of it is left out."""

    def folded(net):
        getattr(net, part).bias.data.mul_(1.01)
        return net

    monkeypatch.setattr(fast_teacher, 'fuse_conv_bn', folded)
    teacher, _ = dense('dict')
    weight = dict(scores=teacher.network.boxes, boxes=teacher.network.scores)[part].weight
    weight.data.mul_(1e4)
    getattr(teacher.network, part).weight.data.zero_()
    getattr(teacher.network, part).bias.data.fill_(1)
    teacher(INPUTS)
    assert torch.equal(teacher(INPUTS)[part], expected(teacher)[part])


def test_another_form_is_another_output():
    agree = fast_teacher._agree
    one, two = torch.ones(2), torch.ones(2, 1)
    assert agree((one, two), (one, two), 0) and agree({'a': one}, {'a': one}, 0)
    assert not agree([one, two], (one, two), 0)
    assert not agree({'a': one}, {'b': one}, 0)
    assert not agree(one, two, 0)  # nor is what is only alike when broadcast
    assert not agree((one,), (one, one), 0)
    assert not agree(one * torch.nan, one, 1)


def test_outputs_that_are_not_all_tensors_come_from_the_network_itself():
    teacher = FrozenTeacher(with_statistics(Dense(lambda scores, boxes: (scores, None))))
    teacher.train()
    for _ in range(2):
        assert torch.equal(teacher(INPUTS)[0], expected(teacher)[0])
    assert teacher._copy is None


def test_the_copy_is_given_the_samples():
    teacher = FrozenTeacher(with_statistics(Scaled(lambda scores, boxes: scores)))
    teacher.train()
    with torch.no_grad():
        unscaled = Dense.forward(teacher.network, INPUTS)
    for scale in (2.0, 3.0):
        assert_same(teacher(INPUTS, [DataSample(metainfo=dict(scale=scale))]), scale * unscaled)
    assert teacher._copy is not None


def test_released_it_is_the_network_that_it_was():
    net = with_statistics(Dense(FORMS['dict']))
    own, calls = net.data_preprocessor, []
    net.scores.register_forward_hook(lambda *_: calls.append(0))
    teacher = FrozenTeacher(net)
    recorders = RecorderManager(dict(scores=dict(type='mmrazor.ModuleOutputs', source='scores')))
    recorders.initialize(net)
    teacher.is_read_by(recorders, DistillDeliveryManager())
    preprocessor = ClsDataPreprocessor(mean=[1.0], std=[2.0])
    teacher.use_inputs_of(preprocessor, normalises=True)
    assert net.data_preprocessor is preprocessor and len(net._forward_pre_hooks) == 1
    teacher.release()
    assert net.data_preprocessor is own and not net._forward_pre_hooks
    with recorders:
        net(INPUTS)
    assert not recorders.get_recorder('scores').data_buffer
    assert calls  # a hook of somebody else stays


def test_a_sharded_teacher_keeps_no_copy_and_is_whole_in_one_process(copies):
    teacher = FrozenTeacher(build(network(4)), sharding=True)
    teacher.train()
    logits = [teacher(torch.zeros(2, 1, 8, 8)) for _ in range(3)]
    assert teacher.speed == 'plain' and not copies and not teacher.is_sharded
    assert all(type(parameter) is nn.Parameter for parameter in teacher.network.parameters())
    torch.testing.assert_close(logits[2], teacher.network(torch.zeros(2, 1, 8, 8)), rtol=0, atol=0)
    for speed in ('bf16', 'compile'):
        with pytest.raises(ValueError, match=f"teacher_speed='{speed}' needs a copy of the whole teacher"):
            FrozenTeacher(build(network(4)), speed=speed, sharding=True)
