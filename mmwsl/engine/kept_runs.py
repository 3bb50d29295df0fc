"""Keep finished runs in three files that diff and merge line by line."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from filelock import FileLock
from mmengine.config import Config

from mmwsl.utils.files import whole_file


class KeptRuns:
    """Reads and writes the finished runs of a folder.

    ``runs.jsonl`` has a line for each run: name, config, settings, seed, figures, time and machine. ``curves.jsonl``
    has what each logged. ``configs.jsonl`` has whole configs, each once: runs that differ only in seed and work
    dir share one.

    Args:
        folder: Where the files are; it is made when the first run is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[dict]:
        """Return all runs, sorted by name.

        Raises:
            ValueError: If a line of a file cannot be read; the file is named.
        """
        return self._read('runs')

    def find(self, name: str) -> dict | None:
        """Return a run by its name, or None."""
        return next((run for run in self.all() if run['name'] == name), None)

    def curves(self) -> dict[str, list[dict]]:
        """Return what runs logged, as :func:`mmwsl.engine.runs.scalars` does, by their names."""
        return {curve['name']: curve['log'] for curve in self._read('curves')}

    def configs(self) -> dict[str, str]:
        """Return the texts of configs, without seed and work dir, by the ``config_sha256`` of their runs."""
        return {kept['sha256']: kept['text'] for kept in self._read('configs')}

    def config_of(self, run: dict) -> Config:
        """Return the whole config of a run, with its seed."""
        cfg = Config.fromstring(self.configs()[run['config_sha256']], '.py')
        cfg.randomness.seed = run['seed']
        return cfg

    def keep(self, run: dict, log: list[dict], config: str) -> dict:
        """Keep a run, replacing any of the same name; a process that is killed meanwhile leaves no broken file.

        Args:
            run: ``name``, ``seed`` and whatever else is known of it.
            log: What it logged.
            config: The text of its whole config.

        Returns:
            The run as it is kept.
        """
        text = _shared(config)
        kept = {**run, 'config_sha256': hashlib.sha256(text.encode()).hexdigest()[:12]}
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / '.lock'):  # jobs of a sweep may end at the same time
            runs = {**{other['name']: other for other in self.all()}, run['name']: kept}
            curves = {**self.curves(), run['name']: log}
            configs = {**self.configs(), kept['config_sha256']: text}
            used = {other['config_sha256'] for other in runs.values()}
            # the runs last, since they refer to the other files
            self._write('configs', [dict(sha256=key, text=configs[key]) for key in sorted(used)])
            self._write('curves', [dict(name=name, log=log) for name, log in sorted(curves.items())])
            self._write('runs', [runs[name] for name in sorted(runs)])
        return kept

    def _read(self, name: str) -> list[dict]:
        path = self.folder / f'{name}.jsonl'
        if not path.exists():
            return []
        try:
            return [json.loads(line) for line in path.read_text().splitlines()]
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{path} is damaged: a line of it is not JSON ({error}). Restore the file, or delete that line'
            ) from error

    def _write(self, name: str, lines: list[dict]) -> None:
        with whole_file(self.folder / f'{name}.jsonl') as file:
            file.write(''.join(json.dumps(line) + '\n' for line in lines).encode())


def _shared(config: str) -> str:
    """Return a config's text without seed and work dir."""
    return re.sub(
        r'(randomness = dict\(.*?seed=)\d+',
        r'\1None',
        re.sub(r'(?m)^work_dir = .*\n?', '', config),
        count=1,
        flags=re.DOTALL,
    )
