"""The raw loop's trainer, once in every process that imports this."""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from raw_loop import Trainer


@functools.cache
def trainer(folder: Path, kind: str) -> Trainer:
    """One network for all sites of this process."""
    torch.set_num_threads(1)
    return Trainer(folder, kind, json.loads((folder / "job.json").read_text()))
