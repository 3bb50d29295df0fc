"""Train several runs step by step; a GPU captures a step once as a CUDA graph and replays it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mmwsl.engine.together.batches import Batches
from mmwsl.engine.together.member import Member
from mmwsl.models.teachers import FrozenTeacher
from mmwsl.models.teachers.recording import recording

_LOGGED = 50  # steps from one that logs to the next
_WARM_UP = 3  # steps before a graph is captured, in which libraries choose their kernels and reserve memory


class Together:
    """Trains members together, step by step.

    Args:
        members: The runs, each with its own seed.
        batches: Batches of each seed.
    """

    def __init__(self, members: Sequence[Member], batches: dict[int, Batches]) -> None:
        self.members, self.batches = members, batches
        self.groups = [(batches[seed], [member for member in members if member.seed == seed]) for seed in batches]
        self.teachers = [_Teachers(group) for _, group in self.groups]
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self.sizes = next(iter(batches.values())).sizes

    def train_epoch(self, drawn: dict[int, Tensor]) -> None:
        """Train an epoch of the batches that were drawn for each seed."""
        for seed, batches in self.batches.items():
            batches.begin(drawn[seed])
        for number, size in enumerate(self.sizes):
            logs = number % _LOGGED == 0
            if self.graphs:
                self.graphs[size, logs].replay()
            else:
                self.step(size, logs)

    def step(self, size: int, logs: bool) -> None:
        """Train all members on the next batch of their seed."""
        held = []  # until all are done: memory that is freed may be reused by a stream while another still reads it
        for (batches, members), teachers in zip(self.groups, self.teachers, strict=True):
            batch = batches.next(size)
            prepared = members[0].model.data_preprocessor(batch, True)
            held.append(prepared)
            teachers.teach(**prepared)
            for member in members:
                with _on(member.stream):
                    member.train(**prepared, logs=logs)
        for stream in (*(member.stream for member in self.members), *(each.stream for each in self.teachers)):
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    def warm_up(self, size: int) -> None:
        """Take a few steps with one batch size, always on the epoch's first images, since an epoch may be shorter."""
        for step in range(_WARM_UP):
            for batches in self.batches.values():
                batches.position.zero_()
            self.step(size, logs=step % 2 == 0)

    def capture(self, drawn: dict[int, Tensor]) -> None:
        """Capture a step with each batch size as a CUDA graph, and undo what the steps before it have trained."""
        for seed, batches in self.batches.items():
            batches.begin(drawn[seed])
        before = [[tensor.clone() for tensor in member.state()] for member in self.members]
        capturing = torch.cuda.Stream()
        for size in sorted(set(self.sizes), reverse=True):
            with _on(capturing):
                self.warm_up(size)
            torch.cuda.current_stream().wait_stream(capturing)
            torch.cuda.synchronize()
            for logs in (False, True):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=capturing):
                    self.step(size, logs)
                self.graphs[size, logs] = graph
        for member, tensors in zip(self.members, before, strict=True):
            _restore(member.state(), tensors)
            member.sums.zero_()
            member.count.zero_()


class _Teachers:
    """The teachers of some members, each run once per batch, in parallel with the students.

    Args:
        members: All see the same batches.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.shared: dict[str, tuple[Member, FrozenTeacher, list[_Answer]]] = {}
        for member in members:
            if not hasattr(member.model, 'frozen_teacher'):
                continue
            described = json.dumps(
                [
                    member.cfg.optim_wrapper.get('type'),
                    *(
                        member.cfg.model.get(key)
                        for key in ('teacher', 'teacher_ckpt', 'teacher_norm_eval', 'teacher_speed')
                    ),
                ],
                default=str,
                sort_keys=True,
            )
            own = member.model.frozen_teacher
            *_, answers = self.shared.setdefault(described, (member, own, []))
            answers.append(_Answer(own, member.model.distiller))
            member.model.frozen_teacher = answers[-1]
        self.stream = torch.cuda.Stream() if self.shared and members[0].stream is not None else None

    def teach(self, inputs: Tensor, data_samples: list) -> None:
        """Run each teacher on a batch, and pass its output to the members."""
        for member, teacher, answers in self.shared.values():
            with _on(self.stream), member.wrapper.optim_context(member.model):
                teacher.prepare(inputs, data_samples)
                output = teacher(inputs, data_samples)
                ready = torch.cuda.current_stream().record_event() if self.stream is not None else None
            for answer in answers:
                answer.output, answer.ready = output, ready


class _Answer:
    """Stands in for a member's frozen teacher, and returns the output of an equal one.

    Args:
        teacher: The teacher that it replaces, whose recorders it fills.
        distiller: Made to wait for the output before it computes losses.
    """

    def __init__(self, teacher: FrozenTeacher, distiller: Any) -> None:
        self.teacher = teacher
        self.output: Any = None
        self.ready: Any = None
        self._compute = distiller.compute_distill_losses
        distiller.compute_distill_losses = self._when_ready

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def prepare(self, *_: Any) -> None:
        """Do nothing: the teacher that runs is prepared."""

    def __call__(self, inputs: Tensor, data_samples: list | None = None) -> Any:
        with recording(self.teacher.recorders):
            for recorder in self.teacher.recorders.recorders.values():
                recorder.forward_hook(self.teacher.network, (inputs,), self.output)
        return self.output

    def _when_ready(self) -> dict[str, Tensor]:
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)
        return self._compute()


def _on(stream: Any) -> Any:
    """Run in a stream, after all work that the current one has so far; for None, in the current one."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


@torch.no_grad()
def _restore(now: list[Tensor], before: list[Tensor]) -> None:
    """Restore tensors; those that an optimiser did not have yet become zeros, from which it would start."""
    for tensor, old in zip(now, before, strict=False):
        tensor.copy_(old)
    for tensor in now[len(before) :]:
        tensor.zero_()
