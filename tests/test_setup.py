"""What a wheel brings along for OpenMIM."""
import subprocess
import sys

import yaml
from mmengine.config import Config

from tests.tiny import ROOT


def test_configs_and_tools_travel_where_mim_looks(tmp_path):
    subprocess.run([sys.executable, '-W', 'ignore', 'setup.py', '--quiet', 'build_py', '--build-lib', str(tmp_path)],
                   cwd=ROOT, check=True)
    for package in ('mmwsl', '_mmwsl_mim'):  # import's and, before mmwsl-*.dist-info in order, onedl-mim's
        mim = tmp_path / package / '.mim'
        metafile, = yaml.safe_load((mim / 'model-index.yml').read_text())['Import']
        for model in yaml.safe_load((mim / metafile).read_text())['Models']:
            assert (mim / model['Config']).exists()
        assert Config.fromfile(mim / 'configs/wsl_digits.py').model.type == 'mmwsl.WSLDistill'
        assert (mim / 'tools/train.py').exists()
