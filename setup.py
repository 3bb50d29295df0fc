"""The package, with configs and tools inside it as ``mmwsl/.mim``, where OpenMIM looks for them."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TRAVELS = ('configs', 'tools', 'model-index.yml')

# onedl-mim 0.5.1 looks in the folder of the first file in the sorted list of what a wheel installs. Where the names of
# distribution and package agree, that is the one named .dist-info, unless there is a folder before it.
LISTED_FIRST = '_mmwsl_mim'

# Either set installs the same import names, so neither can be a plain requirement.
SETS = {
    'onedl': ['onedl-mmengine>=0.10.12', 'onedl-mmcv>=2.3.6', 'onedl-mmpretrain>=1.3.6'],
    'openmmlab': ['mmengine>=0.10.7', 'mmcv-lite>=2.1.0,<2.2.0', 'mmpretrain>=1.2.0'],
}
# All but mmwsl.functional needs these with either set.
STACK = [
    'mmrazor==1.0.0',  # the distillation machinery; compat.py fits this release
    'joblib',  # mmrazor needs it and does not declare it
    'setuptools<81',  # mmengine 0.10.7 imports pkg_resources, which 81 warns of and 82 removed
    'torchvision',  # mmpretrain imports it
    'numpy',  # records and views; mmengine needs it too
    'scipy',  # the bias-variance decomposition, a calibrated temperature
    'pillow',  # looks into files of images; torchvision's transforms need it too
    'rich',  # the progress bar of a teacher cache; mmengine needs it too
    'filelock>=3.30',  # one process in a work dir or a teacher cache; 3.30 brought lock_descriptor
]
# Segmentors and detectors, with their data; one extra for each set.
DENSE = {
    'dense': ['onedl-mmsegmentation>=1.4.2', 'onedl-mmdetection>=3.5.1'],
    'dense-openmmlab': [
        'mmsegmentation>=1.2.2',
        'mmdet>=3.3.0',
        'ftfy',
        'regex',  # mmsegmentation imports them and leaves them to its own extras
    ],
}
TIMM = [
    'timm',  # MobileNetV1, and teachers of timm's
]
DEMO = [
    'scikit-learn',  # the digits
    'matplotlib',  # the pictures; mmengine needs it too
]


class BuildWithMim(build_py):
    """Copies what travels into a wheel, and links it in an editable install.

    OpenMMLab's own ``add_mim_extension`` looks for 'develop' in sys.argv and misses today's editable installs.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            self.fill(ROOT / 'mmwsl' / '.mim')
        else:
            for folder in ('mmwsl', LISTED_FIRST):
                self.fill(Path(self.build_lib).resolve() / folder / '.mim')

    def fill(self, mim: Path) -> None:
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in TRAVELS:
            source, target = ROOT / name, mim / name
            if self.editable_mode:
                target.symlink_to(source, target_is_directory=source.is_dir())
            elif source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy(source, target)


def version() -> str:
    scope: dict = {}
    exec((ROOT / 'mmwsl' / 'version.py').read_text(), scope)
    return scope['__version__']


setup(
    name='mmwsl',
    version=version(),
    description='Knowledge distillation with weighted soft labels (ICLR 2021) for OpenMMLab',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=find_packages(include=['mmwsl', 'mmwsl.*']),
    package_data={'mmwsl': ['py.typed']},
    cmdclass=dict(build_py=BuildWithMim),
    install_requires=[
        'torch>=2.6',  # the equations, and loading weights without running code
    ],
    extras_require={
        **{name: [*distributions, *STACK] for name, distributions in SETS.items()},
        **DENSE,
        'timm': TIMM,
        'demo': DEMO,
        'triton': [
            'triton>=3.6; platform_system == "Linux"',  # the loss's kernels; CUDA builds of torch bring what fits them
        ],
        'onnx': [
            'onnxscript',  # torch.onnx needs it, and it brings onnx
            'onnxruntime',  # an exported student is compared with torch
        ],
        'slurm': [
            'submitit',  # hands a run to slurm
        ],
        'docs': [
            'sphinx',  # builds the site
            'myst-parser',  # reads its pages, which are Markdown
            'furo',  # its theme
            'sphinx-copybutton',  # a button that copies a block of code
        ],
        'dev': [
            *TIMM,  # tests build every config
            *DEMO,  # tests train on the digits
            'pytest',  # runs the tests
            'pytest-xdist',  # in several processes
            'hypothesis',  # draws their inputs
            'ruff',  # lint
            'mypy',  # types
        ],
    },
)
