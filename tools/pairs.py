"""Write docs/pairs.md, which says which weighting goes with which loss, by trying each pair."""

import mmwsl.registry  # noqa: I001  readies the stack, so it comes first

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

import mmwsl.models  # noqa: F401  registers the parts
from mmwsl.cache.teacher_losses import TeacherLosses
from mmwsl.models.losses import SampleLoss, WeightedLoss
from mmwsl.models.losses.base import build_loss
from mmwsl.models.weightings import SampleWeighting, build_weighting
from mmwsl.registry import MODELS
from mmwsl.utils import whole_file
from mmwsl.utils.text import table

PAGE = Path(__file__).resolve().parent.parent / 'docs/pairs.md'
# arguments that a part needs, and settings that change for which pairs it is defined
NEEDED: dict[str, dict] = {'ProductWeighting': dict(factors=[dict(type='WSLWeighting'), dict(type='EntropyWeighting')])}
SETTINGS: dict[str, list[dict]] = {
    'BernoulliKD': [dict(per_class=False)],
    'DIST': [dict(beta=0)],
    'WSLWeighting': [dict(teacher_losses='FILE')],
}
PROSE = """# Which weighting goes with which loss

Written by `tools/pairs.py`, which tries each loss in the registry with each weighting. Run it again after adding one.

A pair goes into `model.distiller.distill_losses`, for example as `dict(type='mmwsl.WeightedLoss',
loss=dict(type='DKD', tau=4.0), weighting=dict(type='WSLWeighting'))`. [losses_and_weights.md](losses_and_weights.md)
explains what each loss and weighting computes, and [own_parts.md](own_parts.md) shows how to add one. A pair that is
not defined is refused when the model is built.

"""


def parts(kind: type) -> dict[str, dict[str, Any]]:
    """Return the configs of this project's registered losses, or weightings, by their names on the page."""
    names = sorted(
        name
        for name, part in MODELS.module_dict.items()
        if isinstance(part, type) and issubclass(part, kind) and part.__module__.startswith('mmwsl.')
    )
    found = {}
    for name in names:
        found[f'`{name}`'] = dict(type=name, **NEEDED.get(name, {}))
        for setting in SETTINGS.get(name, []):
            shown = ', '.join(f'{key}={value}' for key, value in setting.items())
            found[f'`{name}`, {shown}'] = dict(type=name, **setting)
    return found


def why_not(loss: dict, weighting: dict) -> str:
    """Return why a pair is refused; '' if it is defined."""
    try:
        WeightedLoss(loss, weighting)
    except ValueError as error:
        return str(error).partition(' is not defined: ')[2]
    return ''


def page() -> str:
    """Return the page: its prose, the table of pairs and the reasons for refusals."""
    with mock.patch.object(TeacherLosses, 'load', return_value=SimpleNamespace(losses=np.zeros(1, np.float32))):
        losses, weightings = parts(SampleLoss), parts(SampleWeighting)
        refusals = [[why_not(loss, weighting) for loss in losses.values()] for weighting in weightings.values()]
        notes = list(dict.fromkeys(refusal for row in refusals for refusal in row if refusal))
        cells = [[f'no ({notes.index(refusal) + 1})' if refusal else 'yes' for refusal in row] for row in refusals]
        rows = [
            (name, *row, _one_class(build_weighting(weighting)))
            for (name, weighting), row in zip(weightings.items(), cells, strict=True)
        ]
        built = [build_loss(loss) for loss in losses.values()]
    rows.append(('*one class for each image (no mixup)*', *map(_one_class, built), ''))
    rows.append(('*head of the student*', *('sigmoids' if loss.for_sigmoids else 'softmax' for loss in built), ''))
    reasons = ''.join(f'{number}. {note[0].upper()}{note[1:]}.\n' for number, note in enumerate(notes, 1))
    return f'{PROSE}{table(("", *losses, "*one class for each image (no mixup)*"), rows)}\n\n{reasons}'


def _one_class(part: Any) -> str:
    return 'needed' if part.needs_classes else ''


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with whole_file(PAGE) as file:
        file.write(page().encode())
    print(PAGE.relative_to(PAGE.parent.parent))


if __name__ == '__main__':
    main()
