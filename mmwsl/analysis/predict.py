"""Build the networks and dataloaders of a config outside a run, and collect predictions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmwsl.analysis.regularization import records_of_logits
from mmwsl.cache.fingerprint import teacher_files
from mmwsl.models.teachers import CachedTeacher
from mmwsl.utils.checkpoint import check_files, load_network
from mmwsl.utils.data import collate_for, number_images, sample_indices, set_dataloader_defaults, single_labels


def build_model(cfg: Config, student_only: bool = False) -> Any:
    """Build a config's model in eval mode, on the GPU if there is one.

    Args:
        cfg: Config of a distillation, or of a single network.
        student_only: Whether to build only the student of a distillation.
    """
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    if student_only or 'architecture' not in cfg.model:
        model = network_config(cfg)
    else:
        model = copy.deepcopy(cfg.model)
        if cfg.get('data_preprocessor'):
            model.setdefault('data_preprocessor', cfg.data_preprocessor)
    network = MODELS.build(model)
    network = network.to('cuda' if torch.cuda.is_available() else 'cpu')
    network.eval()  # not chained: it may return None
    return network


def choose_network(cfg: Config, part: str, checkpoint: str | None = None) -> str | None:
    """Reduce the config of a distillation to one of its networks, as if it were a config of that network alone.

    Args:
        cfg: The config, changed in place. A config of a single network keeps its network.
        part: 'teacher', or 'architecture' for the student.
        checkpoint: File of the network. None uses the teacher's, as in training.

    Returns:
        The checkpoint; None if it was not given, or if the teacher's class loads its weights itself.

    Raises:
        ValueError: If a teacher's checkpoint is neither given nor named in the config, or does not match its
            ``teacher_sha256``.
    """
    if part == 'teacher' and part in cfg.model:
        if not checkpoint:
            checkpoint = cfg.model.get('teacher_ckpt') or _checkpoint_of(cfg.model.teacher)
            check_files(teacher_files(cfg.model.teacher, checkpoint), cfg.model.get('teacher_sha256'))
        if not checkpoint and not (cfg.model.teacher.get('ckpts') or cfg.model.teacher.get('pretrained')):
            raise ValueError(f'{cfg.filename} names no teacher_ckpt: give the checkpoint on the command line')
    cfg.model = network_config(cfg, part)
    return checkpoint


def network_config(cfg: Config, part: str = 'architecture') -> ConfigDict:
    """Return the complete config of one network, so that a run of it prepares images as the distillation does.

    A student's ``data_preprocessor`` is the algorithm's or the config's if there is one, as in training; a teacher may
    have its own. A network of another package (``cfg_path``) is read from that package.

    Args:
        cfg: Config of a distillation, or of a single network, which is then returned.
        part: 'teacher', or 'architecture' for the student.
    """
    model = copy.deepcopy(cfg.model)
    network = _of_its_package(model[part]) if part in model else model
    shared, own = model.get('data_preprocessor') or cfg.get('data_preprocessor'), network.get('data_preprocessor')
    found = [shared, own] if part == 'architecture' and part in model else [own, shared]
    if part == 'teacher' and 'architecture' in model:
        found.append(_of_its_package(model.architecture).get('data_preprocessor'))
    if any(found):
        network.data_preprocessor = next(filter(None, found))
        if str(network.get('type')).endswith('Classifier'):
            network.data_preprocessor = _of_a_classifier(network.data_preprocessor)
    return network


def _of_a_classifier(preprocessor: ConfigDict) -> ConfigDict:
    """Convert mmengine's ImgDataPreprocessor, as in MMRazor's configs, to mmpretrain's, which its classifiers need."""
    if str(preprocessor.get('type')).rpartition('.')[2] != 'ImgDataPreprocessor':
        return preprocessor
    names = ('mean', 'std', 'pad_size_divisor', 'pad_value')
    kept = {key: preprocessor[key] for key in names if key in preprocessor}
    swaps = preprocessor.get('bgr_to_rgb', False) or preprocessor.get('rgb_to_bgr', False)
    return ConfigDict(type='mmpretrain.ClsDataPreprocessor', to_rgb=swaps, **kept)


def _of_its_package(network: ConfigDict) -> ConfigDict:
    """Config of a network of another package, as :func:`mmengine.hub.get_model` builds it."""
    if 'cfg_path' not in network:
        return network
    external = get_config(network.cfg_path)
    found = external.model
    found.setdefault('_scope_', network.cfg_path.partition('::')[0])
    if 'data_preprocessor' in external:
        found.data_preprocessor = external.data_preprocessor
    for key in network.keys() - {'cfg_path', 'pretrained'}:
        found.setdefault(key, network[key])
    return found


def _checkpoint_of(teacher: ConfigDict) -> str | None:
    """The checkpoint that a teacher's own config names."""
    pretrained, init_cfg = teacher.get('pretrained'), teacher.get('init_cfg')
    if pretrained and 'cfg_path' in teacher:
        return get_config(teacher.cfg_path, pretrained=True).model_path
    if isinstance(pretrained, str):
        return pretrained
    return init_cfg['checkpoint'] if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained' else None


def build_dataloader(cfg: Config, field: str, seed: int = 0) -> DataLoader:
    """Build 'train_dataloader' or 'val_dataloader' of a config as a run does."""
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    dataloader = copy.deepcopy(cfg[field])
    set_dataloader_defaults(dataloader, False, collate_for(cfg))
    loader = Runner.build_dataloader(dataloader, seed=seed)
    number_images(loader.dataset)
    return loader


def log_probabilities(network: nn.Module, dataloader: DataLoader) -> tuple[np.ndarray, np.ndarray]:
    """Predict the images of a dataloader with a classifier.

    Returns:
        Log-probabilities, float32, (N, C), and classes, int64, (N, ), in the dataloader's order.
    """
    outputs, targets = [], []
    for inputs, data_samples in batches(network, dataloader):
        with torch.no_grad():
            outputs.append(network(inputs, data_samples, mode='tensor').float().log_softmax(1).cpu())
        targets.append(true_classes(data_samples))
    return torch.cat(outputs).numpy(), torch.cat(targets).numpy()


def batches(network: Any, dataloader: DataLoader) -> Iterator[tuple[Tensor, list[Any]]]:
    """Yield inputs and data samples as the network receives them in a test."""
    for batch in dataloader:
        batch = network.data_preprocessor(batch, False)
        yield batch['inputs'], batch['data_samples']


def true_classes(data_samples: list[Any]) -> Tensor:
    """Return the class of each sample, on the CPU. Shape: (N, ).

    Raises:
        ValueError: If a sample does not have exactly one class.
    """
    labels = single_labels(data_samples)
    if labels is None:
        raise ValueError('each image should have exactly one class: use a labelled dataset for classification')
    return labels


def records_of_checkpoints(
    cfg: Config, checkpoints: dict[int, str], taus: list[float]
) -> dict[float, dict[int, np.ndarray]]:
    """Compute the sample records of a distillation's training set for several checkpoints, all on the same views.

    Views, batches and the teacher's mode are those of the first epoch of training with seed 0; students are in eval
    mode.

    Args:
        cfg: Config of a distillation.
        checkpoints: Files by epoch.
        taus: Temperatures of the soft labels.

    Returns:
        Records of dtype :data:`mmwsl.analysis.RECORD` by temperature and epoch, sorted by index.

    Raises:
        ValueError: If the config has no teacher or an inexact cache, or a checkpoint does not fit its student.
    """
    if 'teacher' not in cfg.model:
        raise ValueError(
            f'regularization samples need a teacher, and the model of this config, a {cfg.model.type}, has none: '
            'give the config of a distillation'
        )
    model = build_model(cfg)
    if isinstance(model.teacher, CachedTeacher) and not model.teacher.cache.manifest.answer_format.is_exact:
        raise ValueError(
            f"{cfg.model.teacher_cache} does not hold the teacher's exact logits, which "
            'other temperatures and the weight need: give the config without teacher_cache'
        )
    model.frozen_teacher.train()
    students = {epoch: copy.deepcopy(model.student) for epoch in checkpoints}
    for epoch, path in checkpoints.items():
        load_network(students[epoch], path)
    parts: dict[float, dict[int, list]] = {tau: {epoch: [] for epoch in students} for tau in taus}
    for inputs, data_samples in batches(model, build_dataloader(cfg, 'train_dataloader')):
        index, target = sample_indices(data_samples), true_classes(data_samples).to(inputs.device)
        with torch.no_grad():
            preds_T = model.teacher(inputs, data_samples, mode='tensor')
            preds_S = {epoch: student(inputs, data_samples, mode='tensor') for epoch, student in students.items()}
        for tau, epoch in itertools.product(taus, students):
            parts[tau][epoch].append(records_of_logits(index, preds_S[epoch], preds_T, target, tau))
    return {
        tau: {epoch: np.sort(np.concatenate(some), order='index') for epoch, some in by_epoch.items()}
        for tau, by_epoch in parts.items()
    }
