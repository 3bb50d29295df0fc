"""Fetch BCCD, the images of blood cells on which configs/det/*_bccd.py train (MIT, 7 MB), with git."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = 'https://github.com/Shenggan/BCCD_Dataset'
TREE = 'e4ad516b612329e16143e94f47a478d5832395d3'  # git's hash of the folder BCCD with all its files


def fetch(source: str, out: Path) -> None:
    """Put the images, boxes, splits and licence into a folder.

    Raises:
        FileExistsError: If the folder exists.
        FileNotFoundError: If git is not installed.
        ValueError: If the source has other files than those that this project's results are about.
        subprocess.CalledProcessError: If git fails.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists. Delete it to fetch it again, or name another folder with --out')
    if not shutil.which('git'):
        raise FileNotFoundError('git is needed, and is not installed')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        git('clone', '--quiet', '--depth', '1', '--config', 'core.autocrlf=false', source, folder)
        tree = git('-C', folder, 'rev-parse', 'HEAD:BCCD')
        if tree != TREE:
            raise ValueError(f'{source} has changed: its folder BCCD has the hash {tree}, and {TREE} was expected')
        cells = Path(folder, 'BCCD')
        shutil.copy(Path(folder, 'LICENSE'), cells)
        cells.rename(out)


def git(*arguments: str) -> str:
    return subprocess.run(('git', *arguments), check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/bccd'), help='folder to write (default: data/bccd)')
    parser.add_argument('--source', default=SOURCE, help='another address, or a clone, of the repository')
    args = parser.parse_args()
    try:
        fetch(args.source, args.out)
    except subprocess.CalledProcessError as error:
        sys.exit(f'Error: git could not fetch {args.source}: {error.stderr.strip()}')
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    print(f'{args.out} has 364 images: 205 to train, 87 to validate, 72 to test')


if __name__ == '__main__':
    main()
