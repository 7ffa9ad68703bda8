"""The demo, on a smaller model."""
import subprocess
import sys

import numpy as np
import timm
from PIL import Image

from scripts.demo import TARGET, write_digits
from tests.engine.helpers import script_env


def test_digits_are_split_once_and_for_all(tmp_path):
    assert write_digits(tmp_path / 'a') == (1437, 360)
    assert write_digits(tmp_path / 'b') == (1437, 360)
    files = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob('*.png')) for f in 'ab']
    assert files[0] == files[1] and len(files[0]) == 1797
    counts = [len(list((tmp_path / 'a' / 'validation' / str(i)).glob('*.png'))) for i in range(10)]
    assert max(counts) - min(counts) <= 2
    with Image.open(tmp_path / 'a' / files[0][0]) as image:
        assert image.size == (64, 64) and np.asarray(image).std() > 10


def test_demo_ends_with_a_table_and_fails_below_its_target(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'scripts.demo', '--model', 'test_resnet_pst', '--epochs', '1'],
        cwd=tmp_path, env=script_env(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    top1 = next(float(line.split()[2].rstrip('%')) for line in lines if line.startswith('top-1, coarse'))
    assert done.returncode == (0 if top1 >= TARGET else 1), done.stderr
    assert any(line.startswith('fine, topk=2, gate') for line in lines)
    assert any(' is a ' in line and 'probability 0.' in line for line in lines)
    with Image.open(tmp_path / 'output/demo/curve.png') as curve:
        assert curve.height > 200
    folder = tmp_path / 'output/demo/test_resnet_pst_digits'
    assert (folder / 'model.safetensors').is_file()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.num_classes == 10 and model.pretrained_cfg['input_size'] == (3, 64, 64)
