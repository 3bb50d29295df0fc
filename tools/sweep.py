"""Train configs x settings x seeds, and keep each run's config, log and figures under results/.

The same command resumes a sweep that was killed; runs that are finished in their work dirs are not repeated. A result
of the same command is replaced, that of another command is not. All configs are run with the first seed, then all with
the second. The project's tables are made by tools/results/.
"""

import mmwsl.registry  # noqa: I001  readies the stack, so it comes first

import argparse
import itertools
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmwsl.compat import from_extra
from mmwsl.engine import runs
from mmwsl.engine.comparison import Metric, metric_of
from mmwsl.engine.config_checks import merge_options
from mmwsl.engine.data_checks import check_data
from mmwsl.engine.kept_runs import KeptRuns
from mmwsl.engine.launch import launcher_parser
from mmwsl.engine.together import train_together

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """A config with settings and a seed."""

    config: Path
    settings: tuple[tuple[str, str], ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of the config, with the last part of each setting's key, and the seed."""
        settings = ''.join(f'-{key.rpartition(".")[2]}={value.replace("/", "_")}' for key, value in self.settings)
        return f'{self.config.stem}{settings}-seed={self.seed}'

    @property
    def options(self) -> list[str]:
        return [*(f'{key}={value}' for key, value in self.settings), f'randomness.seed={self.seed}']


def plan(configs: list[Path], settings: list[str], seeds: list[int]) -> list[Run]:
    """Return every combination; the seed changes last.

    Args:
        configs: Config files.
        settings: ``key=value1,value2`` each; commas in brackets belong to a value.
        seeds: Seeds of the runs.

    Raises:
        ValueError: If a setting has no value or has spaces, or two runs would have the same name.
    """
    choices = []
    for setting in settings:
        key, equals, values = setting.partition('=')
        if not (key and equals and values) or ' ' in setting:
            raise ValueError(f'--set takes KEY=VALUE1,VALUE2 without spaces (a list as [1,2]), got {setting!r}')
        choices.append([(key, value) for value in split(values)])
    planned = [
        Run(config, combination, seed)
        for seed in seeds
        for config in configs
        for combination in itertools.product(*choices)
    ]
    names = [run.name for run in planned]
    if len(set(names)) < len(names):
        raise ValueError(f'these runs would have the same name: {sorted({n for n in names if names.count(n) > 1})}')
    return planned


def split(values: str) -> list[str]:
    """Split a text at the commas outside brackets."""
    parts, depth = [''], 0
    for char in values:
        depth += (char in '[(') - (char in '])')
        if char == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += char
    return parts


def carry_out(run: Run, args: argparse.Namespace, fresh: bool = False) -> dict:
    """Train a run to its end, keep its result, and return it.

    Args:
        run: The run.
        args: The command's.
        fresh: Whether the training is a child of this process, as it is on a GPU in any case.
    """
    work_dir, kept = args.work_dir / run.name, KeptRuns(args.results)
    options = [*run.options, *args.cfg_options]
    runs.train(ROOT / 'tools/train.py', run.config, work_dir, options, args.threads, fresh=fresh)
    # a result that an earlier sweep kept states the machine and the jobs of that sweep
    found = kept.find(run.name)
    if found and found.get('started') == runs.started(work_dir):
        return found
    return keep(run, work_dir, args)


def carry_out_together(planned: list[Run], args: argparse.Namespace) -> list[dict]:
    """Train all runs in this process, a step of all at a time; those that are kept already are not repeated."""
    kept = {run['name']: run for run in KeptRuns(args.results).all()}
    missing = [run for run in planned if run.name not in kept]
    configs = [Config.fromfile(run.config) for run in missing]
    for run, cfg in zip(missing, configs, strict=True):
        options = [str(run.config), '--cfg-options', *run.options, *args.cfg_options]
        merge_options(cfg, launcher_parser('').parse_args(options).cfg_options)
        check_data(cfg, ('train_dataloader', 'val_dataloader'))
    args.jobs = len(missing)
    if missing:
        train_together(configs, [args.work_dir / run.name for run in missing], partial(print, flush=True))
    kept.update({run.name: keep(run, args.work_dir / run.name, args) for run in missing})
    return [kept[run.name] for run in planned]


class OnSlurm:
    """Carries out a run as a submitit job, and continues it if Slurm preempts the job or its time is up."""

    def __call__(self, run: Run, args: argparse.Namespace) -> dict:
        return carry_out(run, args, fresh=True)  # checkpoint waits for its child

    def checkpoint(self, run: Run, args: argparse.Namespace) -> Any:
        """Wait for the training, which gets the same signal and saves its state, and queue the job again."""
        import submitit

        with suppress(ChildProcessError):  # it has ended
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(self, run, args)


def carry_out_on_slurm(planned: list[Run], args: argparse.Namespace, cluster: str = 'slurm') -> Iterator[dict]:
    """Submit all runs to Slurm as one array of jobs, and wait for them in order.

    Args:
        planned: The runs.
        args: Arguments of this tool; the jobs see the same folders.
        cluster: A submitit executor: 'slurm', or 'local' and 'debug' for this machine.

    Raises:
        ImportError: If submitit is not installed.
    """
    with from_extra('slurm'):
        import submitit

    executor = submitit.AutoExecutor(folder=args.work_dir / 'slurm', cluster=cluster)
    own = dict(option.split('=', 1) for option in args.slurm_options)
    executor.update_parameters(
        **{
            'name': 'sweep',
            'cpus_per_task': args.threads,
            'slurm_partition': args.slurm,
            **{key: int(value) if value.isdigit() else value for key, value in own.items()},
        }
    )
    jobs = executor.map_array(OnSlurm(), planned, [args] * len(planned))
    print(f'{len(jobs)} jobs, {jobs[0].job_id} and so on; their output is in {args.work_dir / "slurm"}', flush=True)
    return (job.result() for job in jobs)


def check_results(planned: list[Run], args: argparse.Namespace) -> None:
    """Raise ValueError if this command would replace the result of a run with other options."""
    kept = {run['name']: run['options'] for run in KeptRuns(args.results).all()}
    for run in planned:
        if kept.get(run.name, args.cfg_options) != args.cfg_options:
            raise ValueError(
                f'{args.results} keeps the result of {run.name} with the options {kept[run.name]}, not '
                f'{args.cfg_options}: choose another --results, or delete its line in runs.jsonl there'
            )


def keep(run: Run, work_dir: Path, args: argparse.Namespace) -> dict:
    """Keep a run's config, its log and the figures; return the figures.

    Raises:
        RuntimeError: If the last epoch was never validated.
    """
    log = runs.scalars(work_dir)
    config = work_dir / run.config.name
    epochs = Config.fromfile(config).train_cfg.max_epochs
    metric = metric_of(log)
    check_last_epoch(log, metric, work_dir, epochs)
    figures = of_each_epoch(log, metric, epochs)
    best = max(value for value in figures if value is not None)
    return KeptRuns(args.results).keep(
        dict(
            name=run.name,
            config=run.config.stem,
            settings=dict(run.settings),
            seed=run.seed,
            metric=metric.key,
            last=figures[-1],
            best=best,
            best_epoch=figures.index(best) + 1,
            of_each_epoch=figures,
            started=runs.started(work_dir),
            seconds=round(runs.seconds(work_dir)),
            options=args.cfg_options,
            machine=machine(args),
        ),
        log,
        config.read_text(),
    )


def check_last_epoch(log: list[dict], metric: Metric, work_dir: Path, epochs: int) -> None:
    """Raise RuntimeError for a run of 0.1.0 that was killed within its last validation, which was not repeated then."""
    validated = max((line['step'] for line in log if metric.key in line), default=0)
    if validated != epochs:
        raise RuntimeError(
            f'the last validation in {work_dir} is of epoch {validated}, not {epochs}. Delete '
            'run.json there and give the same command again, which repeats the validation'
        )


def of_each_epoch(log: list[dict], metric: Metric, epochs: int) -> list[float | None]:
    """Return the metric after each epoch, in per cent; None if it was not validated, or its validation was killed."""
    steps = [line['step'] for line in log if metric.key in line]
    found = {step: round(value, 4) for step, value in zip(steps, metric.scores(log), strict=True)}
    return [found.get(epoch) for epoch in range(1, epochs + 1)]


def machine(args: argparse.Namespace) -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        processor=platform.machine(),
        gpu=gpu,
        threads=args.threads,
        jobs=args.jobs,
        python=platform.python_version(),
        mmwsl=mmwsl.__version__,
        **{name: version(name) for name in ('torch', 'mmrazor')},
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--set',
        action='append',
        default=[],
        metavar='KEY=VALUE1,VALUE2',
        dest='settings',
        help='run every config with each of these values, a list in brackets; may be given several times',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings of every run, as in tools/train.py; tables show a run only if these state no more than '
        'where files are, how they are read and what is logged',
    )
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    parser.add_argument(
        '--together',
        action='store_true',
        help='all runs in one process, step by step: a GPU trains '
        'small networks alongside one another, and runs of one seed share their teacher',
    )
    parser.add_argument(
        '--slurm',
        metavar='PARTITION',
        help='submit the runs to Slurm as one array of jobs (needs '
        'mmwsl[slurm]); a job that is preempted or runs out of time is queued again and continues',
    )
    parser.add_argument(
        '--slurm-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help="arguments of submitit's update_parameters, e.g. timeout_min=240 gpus_per_node=1 "
        'slurm_array_parallelism=8 slurm_qos=low',
    )
    parser.add_argument(
        '--threads', type=int, help='threads of each run, on a CPU; default: all cores, divided among the jobs'
    )
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/sweep'), help='a folder for each run in here')
    parser.add_argument('--results', type=Path, default=Path('results'))
    args = parser.parse_args()
    args.threads = args.threads or max(1, (os.cpu_count() or 1) // args.jobs)
    return args


def main() -> None:
    args = parse_args()
    planned = plan(args.configs, args.settings, args.seeds)
    for config in args.configs:
        Config.fromfile(config)  # finds a mistake in the last config before the first run
    check_results(planned, args)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = (
            carry_out_together(planned, args)
            if args.together
            else carry_out_on_slurm(planned, args)
            if args.slurm
            else pool.map(lambda run: carry_out(run, args), planned)
        )
        for number, result in enumerate(results, 1):
            print(
                f'{number}/{len(planned)} {planned[number - 1].name}: '
                f'{result["metric"].rpartition("/")[2]} {result["last"]:.2f} %, {result["seconds"] / 60:.0f} min',
                flush=True,
            )


if __name__ == '__main__':
    main()
