from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

BUILD = """
import json, sys, torch
if "whole" in sys.argv:
    import monai
from common import models
from common.config import *
built = {}
for name, size in (("resnet10", (32, 32)), ("resnet18", (16, 16, 16)), ("densenet121", (32, 32)),
                   ("efficientnet-b0", (32, 32)), ("vit", (16, 16)), ("vit", (8, 8, 8))):
    width = 0.125 if name.startswith("resnet") else 1.0
    model = ModelConfig(family="monai", name=name, width=width, dimensions=len(size))
    recipe = Recipe(name="x", data=Preprocessing(size=size), task=Task(dimensions=len(size)), model=model)
    network = models.build(recipe).eval()
    x = torch.linspace(-1, 1, 2 * torch.Size(size).numel()).reshape(2, 1, *size)
    with torch.no_grad():
        built[f"{name} {size}"] = [models.get_weights(network).digest, network(x).double().sum().item()]
loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "monai")
downloads = sorted({"gdown", "huggingface_hub", "requests"} & set(sys.modules))
print(json.dumps({"built": built, "loaded": loaded, "downloads": downloads}))
"""


def python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def light() -> Any:
    return json.loads(python(BUILD))


def test_networks_are_the_same_with_all_of_monai_and_with_the_part_that_they_need(light):
    whole = json.loads(python(BUILD, "whole"))
    assert len(light["built"]) == 6
    assert light["built"] == whole["built"]
    assert len(whole["loaded"]) > 300  # what was spared, and the control of the test below


def test_a_network_loads_its_own_modules_alone(light):
    assert "monai.networks.nets.resnet" in light["loaded"]
    assert len(light["loaded"]) < 50
    assert not {"monai.transforms", "monai.data", "monai.losses"} & set(light["loaded"])


def test_a_network_loads_nothing_to_download_with(light):
    assert light["downloads"] == []
    code = (
        "from common.monai_shim import ensure_light_monai; ensure_light_monai()\n"
        "from monai.utils.module import optional_import\n"
        "print(optional_import('huggingface_hub.utils')[1], optional_import('numpy')[1])\n"
        "try: optional_import('requests')[0].get('https://example.org')\n"
        "except Exception as error: print(error)"
    )
    absent, *why = python(code).splitlines()
    assert absent == "False True"
    assert "requests, for Fedicom downloads nothing" in why[0]


def test_the_rest_of_monai_is_there_when_asked_for():
    code = (
        "import sys, torch; from common.monai_shim import ensure_light_monai; ensure_light_monai(); import monai;"
        "from monai.metrics.regression import SSIMMetric; x = torch.rand(1, 1, 16, 16);"
        "print(SSIMMetric(spatial_dims=2)(x, x).item());"
        "print(monai.transforms.ScaleIntensity()(torch.tensor([1.0, 3.0])).tolist(), monai.__version__[:2]);"
        "from monai.networks.nets import UNet; print(UNet.__module__);"
        "print(hasattr(monai, 'nothing'), hasattr(monai.networks.nets, 'nothing'));"
        "import importlib\n"
        "try: importlib.import_module('monai.nothing')\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert python(code).splitlines() == [
        "1.0", "[0.0, 1.0] 1.", "monai.networks.nets.unet", "False False", "No module named 'monai.nothing'",
    ]  # fmt: skip


def test_a_monai_that_is_loaded_already_stays_as_it_is():
    code = (
        "import sys, monai; before = monai.networks.nets.ResNet;"
        "from common.monai_shim import ensure_light_monai; ensure_light_monai(); ensure_light_monai();"
        "from monai.networks.nets import ResNet; print(ResNet is before,"
        "[finder for finder in sys.meta_path if type(finder).__module__ == 'common.monai_shim'])"
    )
    assert python(code).split() == ["True", "[]"]
