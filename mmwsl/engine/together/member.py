"""One of several runs that train together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner.utils import set_random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmwsl.engine.together.config import check_model, learning_rates
from mmwsl.registry import HOOKS
from mmwsl.utils.files import whole_file

_EVALUATED = 1000  # images in a batch of validation, on which the result does not depend


class Member:
    """One run: its model, optimiser, learning rates and what it logs.

    Args:
        cfg: Its config, with randomness.seed.
        work_dir: For its log and checkpoints.
        steps: Batches in an epoch.
        device: Where it trains.

    Raises:
        ValueError: If the config or the model has what is not possible together; the message names it.
    """

    def __init__(self, cfg: Config, work_dir: Path, steps: int, device: torch.device) -> None:
        self.cfg, self.work_dir, self.steps = cfg, work_dir, steps
        self.epochs, self.seed = cfg.train_cfg.max_epochs, cfg.randomness.seed
        set_random_seed(self.seed)
        self.model = MODELS.build(_with_preprocessor(cfg)).to(device)
        check_model(self.model)
        with _quiet():
            self.model.init_weights()
        if device.type == 'cuda':
            self.model.to(memory_format=torch.channels_last)
        _apply_layout(cfg, self.model)
        self.model.train()
        self.wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.optimizer = self.wrapper.optimizer
        self.halves = _Halves(self.model) if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' else None
        self.rates = learning_rates(self.wrapper, cfg, steps).to(device)
        if device.type == 'cuda':
            self.rates = self.rates.float()  # as its optimiser reads them
        self.rate = self.rates[0].clone()
        self.step_number = torch.zeros((), dtype=torch.int64, device=device)
        self.stream = torch.cuda.Stream() if device.type == 'cuda' else None
        self._let_optimizer_read()
        self.names: list[str] = []
        self.sums = torch.zeros(0, device=device)
        self.count = torch.zeros((), device=device)
        self.log = work_dir / f'{datetime.now():%Y%m%d_%H%M%S}' / 'vis_data' / 'scalars.json'

    def _let_optimizer_read(self) -> None:
        """On a GPU, let the optimiser read its learning rates from ``rate`` and never wait for the host.

        Raises:
            ValueError: If the optimiser is neither SGD, Adam nor AdamW.
        """
        if not self.rates.is_cuda:
            return
        if not isinstance(self.optimizer, torch.optim.SGD | torch.optim.Adam):
            raise ValueError(
                f'runs that train together should have SGD, Adam or AdamW, got {type(self.optimizer).__name__}: '
                'leave --together out'
            )
        for group, rate in zip(self.optimizer.param_groups, self.rate.unbind(), strict=True):
            group.update(lr=rate, fused=True, foreach=False)
            if 'capturable' in group:
                group['capturable'] = True

    def train(self, inputs: Tensor, data_samples: list, logs: bool) -> None:
        """Train one step; with ``logs``, add its values to what is logged."""
        self._set_rates()
        distiller: Any = getattr(self.model, 'distiller', None)
        if hasattr(distiller, 'logs_statistics'):
            distiller.logs_statistics = logs
        with counted_at_once(self.model), self.halves or nullcontext():
            with self.wrapper.optim_context(self.model):
                losses = self.model(inputs, data_samples, mode='loss')
            loss, logged = self.model.parse_losses(losses)
            loss.backward()
        if self.halves:
            self.halves.give_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        if logs:
            self._add(logged)

    def _set_rates(self) -> None:
        torch.index_select(self.rates, 0, self.step_number[None], out=self.rate[None])
        if not self.rate.is_cuda:
            for group, rate in zip(self.optimizer.param_groups, self.rate.tolist(), strict=True):
                group['lr'] = rate

    def _add(self, logged: dict[str, Tensor]) -> None:
        values = {name: value for name, value in logged.items() if isinstance(value, Tensor)}
        if not self.names:
            self.names = list(values)
            self.sums = torch.zeros(len(values), device=self.rates.device)
        self.sums += torch.stack([values[name].detach().float().mean() for name in self.names])
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return the epoch's logged values, averaged over the steps that log, and reset them."""
        values = (self.sums / self.count).tolist()
        self.sums.zero_()
        self.count.zero_()
        return dict(zip(self.names, values, strict=True))

    def state(self) -> list[Tensor]:
        """Return all tensors that a step changes."""
        optimizer = [
            value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        ]
        return [*self.model.state_dict().values(), self.step_number, *optimizer]

    def log_epoch(self, epoch: int, logged: dict[str, float]) -> None:
        """Write what an epoch logged, as mmengine's LocalVisBackend does.

        Raises:
            RuntimeError: If the loss is not finite.
        """
        if not math.isfinite(logged.get('loss', 0.0)):
            raise RuntimeError(
                f'the loss of {self.work_dir.name} is {logged["loss"]} in epoch {epoch}: leave this run '
                'out, or give it a smaller optim_wrapper.optimizer.lr'
            )
        step = epoch * self.steps
        self._write(dict(lr=self.rates[step - 1, 0].item(), **logged, epoch=epoch, iter=step, step=step))

    def validate(self, epoch: int, images: Tensor, labels: Tensor) -> float:
        """Return top-1 in per cent, and log it with top-5."""
        top1, top5 = self.top(images, labels)
        self._write({'accuracy/top1': top1, 'accuracy/top5': top5, 'step': epoch})
        return top1

    @torch.no_grad()
    def top(self, images: Tensor, labels: Tensor, ranks: Sequence[int] = (1, 5)) -> list[float]:
        """Return the top-k accuracy in eval mode for each k of ``ranks``, in per cent."""
        self.model.eval()
        hits = torch.zeros(len(ranks), device=images.device)
        for start in range(0, len(images), _EVALUATED):
            batch = dict(inputs=images[start : start + _EVALUATED])
            logits = self.model(**self.model.data_preprocessor(batch, False), mode='tensor')
            best = logits.topk(min(max(ranks), logits.shape[1])).indices
            found = best == labels[start : start + _EVALUATED, None]
            hits += torch.stack([found[:, :rank].sum() for rank in ranks])
        self.model.train()
        return (100 * hits / len(images)).tolist()

    def _write(self, line: dict) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open('a') as file:
            file.write(json.dumps(line) + '\n')

    def save(self, epoch: int) -> None:
        """Write the checkpoint of an epoch, and delete all others but the one before it."""
        meta = dict(epoch=epoch, iter=epoch * self.steps, seed=self.seed, cfg=self.cfg.pretty_text)
        with whole_file(_checkpoint(self.work_dir, epoch)) as file:
            torch.save(dict(meta=meta, state_dict=self.model.state_dict(), optimizer=self.optimizer.state_dict()), file)
        for path in saved(self.work_dir)[:-2]:
            _checkpoint(self.work_dir, path).unlink()

    def resume(self, epoch: int) -> None:
        """Continue from the checkpoint of an epoch."""
        found = torch.load(_checkpoint(self.work_dir, epoch), map_location=self.rates.device, weights_only=False)
        self.model.load_state_dict(found['state_dict'])
        self.optimizer.load_state_dict(found['optimizer'])
        self.step_number.fill_(epoch * self.steps)
        self._let_optimizer_read()


class _Halves:
    """Puts bfloat16 weights into convolutions and linear layers within a context.

    Autocast would launch a kernel to cast each weight, and another for its gradient. This gives the same numbers with
    one kernel for all.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        self.layers = [layer for layer in layers if layer.weight.requires_grad]
        self.whole: list[Tensor] = [layer.weight for layer in self.layers]
        self.halves: list[Tensor] = [nn.Parameter(weight.detach().bfloat16()) for weight in self.whole]

    @torch.no_grad()
    def __enter__(self) -> None:
        torch._foreach_copy_(self.halves, self.whole)
        self._put(self.halves)

    def __exit__(self, *_: Any) -> None:
        self._put(self.whole)

    def _put(self, weights: list[Tensor]) -> None:
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight = weight  # type: ignore[assignment]

    @torch.no_grad()
    def give_gradients(self) -> None:
        """Copy the gradients to the weights that the optimiser has."""
        found = [half.grad for half in self.halves if half.grad is not None]
        taught = [whole for whole, half in zip(self.whole, self.halves, strict=True) if half.grad is not None]
        given = [torch.empty_like(whole) for whole in taught]
        torch._foreach_copy_(given, found)
        for whole, gradient in zip(taught, given, strict=True):
            whole.grad = gradient
        for half in self.halves:
            half.grad = None


@contextmanager
def counted_at_once(model: nn.Module) -> Iterator[None]:
    """Count the batches of all BatchNorm layers with one kernel, if their statistics do not depend on the count."""
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm)
        and layer.training
        and layer.num_batches_tracked is not None
        and layer.momentum is not None
    ]
    counts: list[Any] = [layer.num_batches_tracked for layer in layers]
    for layer in layers:
        layer.num_batches_tracked = None
    try:
        yield
    finally:
        for layer, count in zip(layers, counts, strict=True):
            layer.num_batches_tracked = count
    if counts:
        torch._foreach_add_(counts, 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep mmengine from logging all parameters of each network that it initialises."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    try:
        yield
    finally:
        logger.setLevel(level)


def _with_preprocessor(cfg: Config) -> dict:
    """Return the model's config with the data_preprocessor that the Runner would give it."""
    model = dict(cfg.model)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    return model


def saved(work_dir: Path) -> list[int]:
    """Return the epochs whose checkpoints a run has, in order."""
    return sorted(int(path.stem.removeprefix('epoch_')) for path in work_dir.glob('epoch_*.pth'))


def _checkpoint(work_dir: Path, epoch: int) -> Path:
    return work_dir / f'epoch_{epoch}.pth'


def _apply_layout(cfg: Config, model: nn.Module) -> None:
    """Let the config's ChannelsLastHook, if there is one, do what it does in a Runner."""
    hooks = [*(cfg.get('custom_hooks') or ()), *(cfg.get('default_hooks') or {}).values()]
    for hook in hooks:
        if hook and hook['type'].rpartition('.')[2] == 'ChannelsLastHook':
            HOOKS.build(hook).before_train(SimpleNamespace(model=model))
