"""Print or write the few lines of a config that add weighted soft labels to a distillation of MMRazor."""

import mmwsl.registry  # noqa: F401, I001  readies the stack, so it comes first

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmwsl.analysis.predict import network_config
from mmwsl.engine import read_config
from mmwsl.utils import whole_file

# MMRazor's losses of logits, and their arguments for the student's and the teacher's logits.
LOGIT_LOSSES = {
    'CrossEntropyLoss': ('preds_S', 'preds_T'),
    'DISTLoss': ('logits_S', 'logits_T'),
    'DKDLoss': ('preds_S', 'preds_T'),
    'KDSoftCELoss': ('preds_S', 'preds_T'),
    'KLDivergence': ('preds_S', 'preds_T'),
    'WSLD': ('student', 'teacher'),
}
# A mean over images of tau^2 times a soft cross-entropy or KL, with this reduction: tau and loss_weight can be kept.
SAME_SCALE = {'KDSoftCELoss': 'mean', 'KLDivergence': 'batchmean', 'WSLD': None}
PAPER = dict(tau=2.0, loss_weight=2.5)
INDENT, WIDTH = ' ' * 4, 120
LABELS, LOGITS = 'hard_loss', 'logits'  # recorders that are added if the config has none that fits


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of a distillation of MMRazor, or mmrazor::distill/mmcls/...')
    parser.add_argument('--out', help='file to write; default: the lines are printed')
    parser.add_argument(
        '--beside',
        action='store_true',
        help='keep the losses of logits that the config has; without it they are replaced',
    )
    parser.add_argument(
        '--tau', type=float, help="temperature; default: the replaced loss's if it has the same meaning, otherwise 2"
    )
    parser.add_argument(
        '--loss-weight', type=float, help="default: the replaced loss's if it has the same meaning, otherwise 2.5"
    )
    return parser.parse_args()


def fragment(cfg: Config, base: str, beside: bool = False, **settings: float | None) -> str:
    """Return a config that adds ``mmwsl.WSLLoss`` to another.

    Args:
        cfg: Config of a distillation that has a ConfigurableDistiller of MMRazor.
        base: Its path.
        beside: Whether losses of logits are kept.
        settings: ``tau`` and ``loss_weight``, if given.

    Raises:
        ValueError: If the config is no distillation of logits, or does not train the student.
    """
    check(cfg)
    distiller = cfg.model.distiller
    replaced = (
        [] if beside else [name for name, loss in distiller.distill_losses.items() if _kind(loss) in LOGIT_LOSSES]
    )
    recorders, labels = _labels(cfg)
    losses, mappings = {}, {}
    for name in replaced:
        losses[name] = dict(_delete_=True, **_loss(cfg, distiller.distill_losses[name], settings))
        mappings[name] = _replacing(distiller, name, labels)
    if not replaced:
        losses['loss_wsl'] = _loss(cfg, {}, settings)
        mappings['loss_wsl'], recorders = _adding(cfg, recorders, labels)
    mappings = {name: mapping for name, mapping in mappings.items() if mapping}
    parts = {**recorders, 'distill_losses': losses, **({'loss_forward_mappings': mappings} if mappings else {})}
    lines = '\n'.join(
        line
        for place, (key, part) in enumerate(parts.items(), 1)
        for line in _lines(key, part, '))' if place == len(parts) else ',', INDENT)
    )
    return f'_base_ = {base!r}\nmodel = dict(distiller=dict(\n{lines}\n'


def check(cfg: Config) -> None:
    """Raise ValueError for a config to which the loss cannot be added."""
    distiller = cfg.get('model', {}).get('distiller')
    if not distiller or 'distill_losses' not in distiller:
        raise ValueError(f'{cfg.filename} has no distiller with distill_losses: give the config of a distillation')
    if cfg.model.get('student_trainable', True) is False:
        raise ValueError('student_trainable=False: no student is trained. Add the loss to the config that trains it')


def _kind(loss: dict) -> str:
    """Return the type of an MMRazor loss without its scope; '' for another package's."""
    scope, _, name = loss.get('type', '').rpartition('.')
    return name if scope in ('', 'mmrazor') else ''


def _loss(cfg: Config, replaced: dict, settings: dict[str, float | None]) -> dict:
    kept = {}
    kind = _kind(replaced)
    if kind in SAME_SCALE and replaced.get('reduction', SAME_SCALE[kind]) == SAME_SCALE[kind]:
        kept = {'tau': replaced.get('tau', 1.0), 'loss_weight': replaced.get('loss_weight', 1.0)}
    given = {key: value for key, value in settings.items() if value is not None}
    return dict(
        type='mmwsl.WSLLoss', **{**PAPER, **kept, **given}, **({} if has_labels(cfg) else dict(weighting='label_free'))
    )


def has_labels(cfg: Config) -> bool:
    """Whether each image has one class, unlike mixed or generated ones, whose weight uses the teacher's class."""
    student = network_config(cfg)
    mixed = (student.get('data_preprocessor') or {}).get('batch_augments') or (student.get('train_cfg') or {}).get(
        'augments'
    )
    return not mixed and 'generator' not in cfg.model


def _recorder(recorders: dict | None, kind: str, fits: Any) -> str | None:
    return next(
        (
            name
            for name, recorder in (recorders or {}).items()
            if recorder.type.rpartition('.')[2] == kind and fits(recorder.source)
        ),
        None,
    )


def _labels(cfg: Config) -> tuple[dict, dict]:
    """Return the recorders to add, and where labels are recorded."""
    for side in ('student', 'teacher'):  # a self-distillation's teacher is the student
        if side == 'teacher' and cfg.model.get('teacher'):
            continue
        found = _recorder(
            cfg.model.distiller.get(f'{side}_recorders'), 'ModuleInputs', lambda source: source == 'head.loss_module'
        )
        if found:
            return {}, dict(recorder=found, from_student=side == 'student', data_idx=1)
    return (
        {'student_recorders': {LABELS: dict(type='ModuleInputs', source='head.loss_module')}},
        dict(recorder=LABELS, from_student=True, data_idx=1),
    )


def _replacing(distiller: dict, name: str, labels: dict) -> dict:
    """Return the changes to the mapping of a replaced loss."""
    mapping = distiller['loss_forward_mappings'][name]
    names = LOGIT_LOSSES[_kind(distiller['distill_losses'][name])]
    changed = {} if 'gt_labels' in mapping else {'gt_labels': labels}
    if names == ('preds_S', 'preds_T'):
        return changed
    preds = {new: dict(mapping[old]) for new, old in zip(('preds_S', 'preds_T'), names, strict=True)}
    return {'_delete_': True, **preds, 'gt_labels': dict(mapping.get('gt_labels', labels))}


def _adding(cfg: Config, recorders: dict, labels: dict) -> tuple[dict, dict]:
    """Return the mapping of an added loss, and all recorders; student logits are those that its own loss reads."""
    teachers = cfg.model.get('teachers')
    source = f'{next(iter(teachers))}.head' if teachers else 'head'
    teacher = _recorder(
        cfg.model.distiller.get('teacher_recorders'), 'ModuleOutputs', lambda found: found in (source, f'{source}.fc')
    )
    if teacher is None:
        recorders = {**recorders, 'teacher_recorders': {LOGITS: dict(type='ModuleOutputs', source=source)}}
    return dict(
        preds_S={**labels, 'data_idx': 0},
        preds_T=dict(recorder=teacher or LOGITS, from_student=False),
        gt_labels=labels,
    ), recorders


def _lines(key: str, value: Any, end: str, indent: str = '') -> Iterator[str]:
    """Yield ``key=value`` in one line if it fits, otherwise in a line for each entry."""
    line = f'{indent}{key}={_code(value)}{end}'
    if len(line) <= WIDTH:
        yield line
        return
    yield f'{indent}{key}=dict('
    for place, (inner, entry) in enumerate(value.items(), 1):
        yield from _lines(inner, entry, f'){end}' if place == len(value) else ',', indent + INDENT)


def _code(value: Any) -> str:
    if isinstance(value, dict):
        return f'dict({", ".join(f"{key}={_code(inner)}" for key, inner in value.items())})'
    return repr(value)


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config)
    text = fragment(cfg, str(Path(cfg.filename).resolve()), args.beside, tau=args.tau, loss_weight=args.loss_weight)
    if not args.out:
        print(text, end='')
        return
    with whole_file(Path(args.out)) as file:
        file.write(text.encode())
    print(f'{args.out} adds mmwsl.WSLLoss to {args.config}: train it with tools/train.py {args.out}')


if __name__ == '__main__':
    main()
