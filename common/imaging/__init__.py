"""DICOM in, arrays out: right or refused, never guessed."""

import logging

from common.imaging.pixels import RefusalCode
from common.imaging.preprocess import Augmenter, augmentation, prepare
from common.imaging.series import Refused
from common.imaging.volume import FolderReading, Image, Progress, Source, Volume, iterate_folder, read_folder

# Their warnings quote values of the header, which name patients; a refusal says what is needed
for _name in ("pydicom", "highdicom"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

__all__ = [
    "Augmenter",
    "FolderReading",
    "Image",
    "Progress",
    "RefusalCode",
    "Refused",
    "Source",
    "Volume",
    "augmentation",
    "iterate_folder",
    "prepare",
    "read_folder",
]  # fmt: skip
