"""Draw the pictures of docs/bias_variance.md from results/bias_variance/, whose figures its campaigns wrote."""

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools/analysis_tools'))

import bias_variance as tool

NAMES = {
    'wsl-one': 'plain soft labels (KD)',
    'digits_student': 'student alone',
    'r20': 'student alone',
    'wsl': 'WSL',
    'wsl-drop': 'weight 0 for regularization samples',
    'wsl-only': 'weight 0 for all others',
    'wsl-random': "WSL's weights, shuffled",
    'wsl-one-eval': 'KD, teacher in eval mode',
    'wsl-eval': 'WSL, teacher in eval mode',
}
"""What configs are called, by their names without data."""


def named(arm: str) -> str:
    """Return an arm's name in words."""
    config, _, tau = arm.partition('_tau')
    smoothed = 'teacher-ls' in config
    method = config if config in NAMES else config.partition('_')[0]
    end = ', teacher in eval mode' if config.endswith('8e_eval') else ', label-smoothed teacher' if smoothed else ''
    return NAMES[method] + end + (f', tau {tau}' if tau else '')


def read(path: Path) -> list[dict]:
    """Return the rows of a campaign."""
    with path.open() as stream:
        return [
            {
                key: value if key in ('arm', 'quantity') else float(value) if value else None
                for key, value in row.items()
            }
            for row in csv.DictReader(stream)
        ]


def main() -> None:
    """Draw each campaign."""
    for path in sorted((ROOT / 'results/bias_variance').glob('*.csv')):
        rows = read(path)
        stem = path.stem if '_' in path.stem else f'{path.stem}_bias_variance'
        names = {row['arm']: named(row['arm']) for row in rows}
        picture = ROOT / f'docs/pictures/{stem}.png'
        tool.draw(rows, picture, names, tool.note_on(int(rows[0]['models']), same_data=False))
        print(picture.relative_to(ROOT))


if __name__ == '__main__':
    main()
