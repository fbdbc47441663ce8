"""Score images with the PyPI package hpsv2: python hpsv2_package.py PACKAGE FOLDER < [[image, prompt], ...] > JSON.

It runs in a process of its own because it replaces modules and functions. PACKAGE is the folder where the package is
installed; FOLDER has HPS_v2_compressed.pt and its small architecture, under the real one's name: ViT-H-14.json.
"""

import json
import shutil
import sys
import types
from pathlib import Path

import open_clip
import torch

package, folder = map(Path, sys.argv[1:])
sys.path.insert(0, str(package))
# The wheel lacks CLIP's vocabulary. It imports turtle by mistake, which needs Tk, and clint for progress bars.
shutil.copy(open_clip.tokenizer.default_bpe(), package / "hpsv2" / "src" / "open_clip")
sys.modules["turtle"] = types.SimpleNamespace(forward=None)
sys.modules |= {"clint": types.ModuleType("clint"), "clint.textui": types.SimpleNamespace(progress=None)}

from hpsv2.src.open_clip import add_model_config, create_model, create_model_and_transforms  # noqa: E402

from hpsv2 import img_score  # noqa: E402

real = create_model("ViT-H-14", device=torch.device("meta")).state_dict()
add_model_config(folder / "ViT-H-14.json")  # takes the place of the real one
# As in the package, except that it would download LAION's weights before it loads its own.
img_score.create_model_and_transforms = lambda name, tag, **options: create_model_and_transforms(name, **options)
weights = str(folder / "HPS_v2_compressed.pt")
scores = [float(img_score.score(image, prompt, cp=weights)[0]) for image, prompt in json.load(sys.stdin)]
json.dump({"scores": scores, "shapes": {name: list(value.shape) for name, value in real.items()}}, sys.stdout)
