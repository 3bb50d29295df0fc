"""Measure what a teacher cache loses: loss and weight from answers of each kind, against those of exact logits.

Runs a config's teacher and student over views of training images, without a cache on disk. A teacher that predicts with
batch statistics is also compared with itself in other batches of the same views.
"""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse

import torch
from mmengine.config import Config
from torch import Tensor

from mmwsl.cache import AnswerFormat
from mmwsl.engine.cache_building import answers, build_model, collate, dataset_config
from mmwsl.datasets import SeededViews
from mmwsl.datasets.views import View
from mmwsl.models import WSLLoss
from mmwsl.engine import launcher_parser, prepare_run
from mmwsl.utils import load_network

HEADER = (
    'answer',
    'bytes',
    'loss, mean error / mean',
    'weight, mean error',
    'largest',
    'weight from logits alone, mean error',
)


def parse_args() -> argparse.Namespace:
    parser = launcher_parser(__doc__)
    parser.add_argument('--student', help="the student's checkpoint; without it, its weights are random")
    parser.add_argument('--images', type=int, default=2048)
    parser.add_argument('--top-k', type=int, nargs='+', default=[5, 10, 25])
    return parser.parse_args()


def gather(cfg: Config, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor, WSLLoss]:
    """Return logits of the student, of the teacher and of the teacher in other batches, the classes, and the loss.

    Raises:
        ValueError: If the config has no WSLLoss, or --images is less than a batch.
    """
    model, dataset = build_model(cfg), SeededViews(dataset_config(cfg))
    if args.student:
        load_network(model.student, args.student)
    losses = [loss for loss in model.distiller.distill_losses.values() if isinstance(loss, WSLLoss)]
    size = cfg.train_dataloader.batch_size
    if not losses or args.images < size:
        raise ValueError(
            f'the config should have a WSLLoss, and --images be at least a batch of {size}, got '
            f'{list(model.distiller.distill_losses)} and --images {args.images}'
        )
    images = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[: args.images // size * size]
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))

    def batches(order: Tensor) -> list:
        return [
            collate(cfg.train_dataloader)([dataset[View(int(image), 0, 0)] for image in batch])
            for batch in order.split(size)
        ]

    taught = [answers(model, batch) for batch in batches(images)]
    again = torch.cat([answers(model, batch)[0] for batch in batches(images[shuffled])])
    with torch.no_grad():
        student = [model.student(model.data_preprocessor(batch, True)['inputs']).cpu() for batch in batches(images)]
    teacher, labels = (torch.cat(parts) for parts in zip(*taught, strict=True))
    return torch.cat(student), teacher, again[shuffled.argsort()], labels, losses[0]


def loss_and_weight(
    loss: WSLLoss, student: Tensor, teacher: Tensor, labels: Tensor, hard_loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss and the weight of each image."""
    values = loss(student, teacher, labels, reduction_override='none', teacher_hard_loss=hard_loss)
    return values, loss.sample_terms['w']


def row(
    name: str, size: int | str, exact: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], alone: tuple[Tensor, Tensor]
) -> str:
    difference, weights = (found[0] - exact[0]).abs().mean() / exact[0].mean(), (found[1] - exact[1]).abs()
    return (
        f'| {name} | {size} | {difference:.1e} | {weights.mean():.1e} | {weights.max():.1e} | '
        f'{(alone[1] - exact[1]).abs().mean():.1e} |'
    )


def main() -> None:
    args = parse_args()
    cfg = Config.fromfile(args.config)
    prepare_run(cfg, args, ('train_dataloader',))
    student, teacher, again, labels, loss = gather(cfg, args)
    exact = loss_and_weight(loss, student, teacher, labels)
    print(f'{len(labels)} views, tau {loss.tau}; mean loss {exact[0].mean():.4g}, mean weight {exact[1].mean():.4f}')
    print(f'| {" | ".join(HEADER)} |\n|{" --- |" * len(HEADER)}')
    for top_k in (None, *args.top_k):
        for dtype in ('float32', 'float16'):
            form = AnswerFormat(teacher.shape[1], top_k, dtype, (loss.tau,) if top_k else ())
            encoded = form.encode(teacher, labels)
            restored = form.decode(encoded, loss.tau)
            found = loss_and_weight(loss, student, restored, labels, form.hard_loss(encoded))
            alone = loss_and_weight(loss, student, restored, labels)
            print(row(f'{f"top {top_k}" if top_k else "all"}, {dtype}', form.layout.itemsize, exact, found, alone))
    other = loss_and_weight(loss, student, again, labels)
    print(row('all, in other batches', '', exact, other, other))
    print(f'logits in other batches: {(again - teacher).norm() / teacher.norm():.1e} of their norm')


if __name__ == '__main__':
    main()
