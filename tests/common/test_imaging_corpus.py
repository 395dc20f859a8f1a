"""Files that fuzzing found (tests/fuzz/fuzz_imaging.py): each is read right or refused, within bounds."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from common.imaging import RefusalCode, read_folder

CORPUS = sorted((Path(__file__).parents[1] / "data" / "dicom_fuzz").glob("*.bin"))


def test_the_corpus_is_there_and_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS]
    assert len(sizes) >= 10
    assert max(sizes) < 50_000
    assert sum(sizes) < 1_000_000


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_a_found_file_is_read_right_or_refused(tmp_path: Path, path: Path) -> None:
    """The name says what became of it: a code of refusal, or `read`."""
    shutil.copy(path, tmp_path / "a")
    tracemalloc.start()
    try:
        reading = read_folder(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**26
    kind = path.stem.rpartition("-")[0]
    if kind == "read":
        (item,) = (*reading.volumes, *reading.images)
        assert np.isfinite(item.values_ZYX if hasattr(item, "values_ZYX") else item.values_YX).all()
    else:
        (refused,) = reading.refused
        assert refused.code == RefusalCode(kind)
