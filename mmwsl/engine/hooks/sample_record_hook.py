from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.runner import Runner
from torch import Tensor

from mmwsl.analysis.records import write_records
from mmwsl.analysis.regularization import records_of_terms
from mmwsl.compat import from_extra
from mmwsl.engine.runners import counts_iterations, first_hook
from mmwsl.models.losses import WeightedLoss
from mmwsl.registry import HOOKS
from mmwsl.utils.checkpoint import unwrapped_model
from mmwsl.utils.data import number_images, sample_indices

_QUANTILES = (0.1, 0.5, 0.9)
_TERMS = ('w', 'L_s', 'L_t', 'a', 'b')
_SAMPLED = 2**12  # targets that are read of a batch, which may have millions
_PRIME = 2654435761


@HOOKS.register_module()
class SampleRecordHook(Hook):
    """Log the distribution of the sample weights, and write the terms of the loss for every sample.

    At the logger's interval it logs ``wsl/w_p10``, ``w_p50`` and ``w_p90`` (percentiles of w), ``wsl/L_s`` and
    ``wsl/L_t`` (the mean losses, in nats) of the samples since the last time. Every ``interval`` epochs and after the
    last, it writes an array to ``<work_dir>/sample_records/epoch_N.npy`` (:mod:`mmwsl.analysis.records`), and a
    histogram of w to the visualizer. w is WSL's weight whichever ``weighting`` is applied. An epoch that was not seen
    whole is not written. Samples whose target is ignored are left out.

    If samples have several targets (pixels, boxes, labels), or the run counts iterations, nothing is written, and the
    log covers at most 4,096 targets of each batch, at positions that change from batch to batch.

    Args:
        interval: Epochs between records, of 28 bytes a sample.

    Raises:
        ValueError: If the model has no weighted loss or several, or samples that are recorded have no index.
    """

    def __init__(self, interval: int = 1) -> None:
        self.interval = interval
        self.log_interval = 0
        self.unlogged = 0
        self.writes = True
        self.indices: list[int] = []
        self.terms: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        if counts_iterations(runner):
            self._write_nothing(runner, 'the run counts iterations')
        number_images(runner.train_dataloader.dataset)
        self.model: Any = unwrapped_model(runner.model)
        self.loss = _only_loss(self.model)
        self.log_interval = getattr(first_hook(runner, LoggerHook), 'interval', 0)

    def before_train_epoch(self, runner: Runner) -> None:
        self.indices, self.terms, self.unlogged = [], [], 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.model.distillation_stopped:
            return
        call: Any = self.loss.last_call
        samples = data_batch['data_samples']
        if self.writes and call.batch.student_hard_loss.shape != (len(samples),):
            self._write_nothing(runner, 'samples have several targets')
        if self.writes:
            self.indices.extend(sample_indices(samples))
        # left on its device: a copy to the CPU would wait for that at each step
        self.terms.append(
            _rows(call.sample_terms(), (*_TERMS, 'kept'))
            if self.writes
            else _sampled(_rows(call.weight_terms(), (*_TERMS[:3], 'kept')), batch_idx)
        )
        self.unlogged += 1
        if self.log_interval and (
            (batch_idx + 1) % self.log_interval == 0 or self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):  # whenever the logger may log
            self._log(runner)
        if not self.writes:
            self.terms = self.terms[-self.unlogged :] if self.unlogged and self.log_interval else []

    def _write_nothing(self, runner: Runner, reason: str) -> None:
        self.writes = False
        runner.logger.info(f'SampleRecordHook writes no records, because {reason}. It logs only percentiles.')

    def after_train_epoch(self, runner: Runner) -> None:
        epoch = runner.epoch + 1
        wanted = epoch % self.interval == 0 or epoch == runner.max_epochs
        if not self.writes or not wanted or len(self.terms) < len(runner.train_dataloader):
            return
        rows = torch.cat(self.terms, 1).cpu()
        kept = rows[-1] > 0
        terms = dict(zip(_TERMS, rows[:-1, kept], strict=True))
        gathered = all_gather_object(records_of_terms(list(compress(self.indices, kept.tolist())), terms))
        if is_main_process():
            records = np.concatenate(gathered)
            write_records(records, runner.work_dir, epoch)
            runner.visualizer.add_image('wsl_weights', _histogram(records['w'], epoch), step=epoch)

    def _log(self, runner: Runner) -> None:
        rows = torch.cat(self.terms[-self.unlogged :], 1)
        w, student, teacher = rows[:3, rows[-1] > 0]
        self.unlogged = 0
        if not len(w):
            return
        levels = torch.tensor(_QUANTILES, dtype=w.dtype, device=w.device)
        scalars = {
            f'w_p{100 * level:.0f}': value for level, value in zip(_QUANTILES, torch.quantile(w, levels), strict=True)
        }
        for name, value in {**scalars, 'L_s': student.mean(), 'L_t': teacher.mean()}.items():
            runner.message_hub.update_scalar(f'train/wsl/{name}', value)


def _only_loss(model: Any) -> WeightedLoss:
    losses = getattr(getattr(model, 'distiller', None), 'distill_losses', {})
    found = {name: loss for name, loss in losses.items() if isinstance(loss, WeightedLoss)}
    if len(found) != 1:
        raise ValueError(
            f'SampleRecordHook needs exactly one weighted loss in model.distiller.distill_losses, but there '
            f'{"are " + ", ".join(found) if found else "is none"}. Plain soft labels can be recorded too, '
            "as WSLLoss with weighting='one'"
        )
    return next(iter(found.values()))


def _rows(terms: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """Stack the terms of all targets, a row for each name. Shape: (len(names), M)."""
    w = terms['w']
    return torch.stack([terms[name].to(w.dtype).expand_as(w).flatten() for name in names])


def _sampled(rows: Tensor, step: int) -> Tensor:
    """Return some columns, spread evenly and different in each step, without drawing random numbers."""
    columns = rows.shape[1]
    if columns <= _SAMPLED:
        return rows
    places = torch.arange(step * _SAMPLED, (step + 1) * _SAMPLED, device=rows.device)
    return rows[:, places * _PRIME % columns]


def _histogram(weights: np.ndarray, epoch: int) -> np.ndarray:
    """Draw the distribution of the weights. Shape: (H, W, 3), RGB, uint8."""
    with from_extra('demo'):  # slow to import, and not needed by other hooks
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(5, 3), layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.hist(weights, bins=40, range=(0, 1), color='0.4', edgecolor='white')
    axes.set(
        xlabel='sample weight w',
        ylabel='samples',
        xlim=(0, 1),
        title=f'epoch {epoch}: mean {weights.mean():.3f}, median {np.median(weights):.3f}',
    )
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
