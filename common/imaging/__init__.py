"""DICOM in, arrays out: right or refused, never guessed."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.imaging.augment import Augmenter, augmentation
    from common.imaging.preprocess import prepare
    from common.imaging.refusal import RefusalCode, Refused
    from common.imaging.reporting import Algorithm, Said, structured_report
    from common.imaging.volume import FolderReading, Image, Progress, Source, Volume, iterate_folder, read_folder

# Their warnings quote values of the header, which name patients; a refusal says what is needed. The filter as well as
# the level: pydicom sets its level anew when it is imported, which is later than this.
for _name in ("pydicom", "highdicom"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.CRITICAL)

__all__ = [
    "Algorithm",
    "Augmenter",
    "FolderReading",
    "Image",
    "Progress",
    "RefusalCode",
    "Refused",
    "Said",
    "Source",
    "Volume",
    "augmentation",
    "iterate_folder",
    "prepare",
    "read_folder",
    "structured_report",
]  # fmt: skip

_PLACES = {
    "augment": ("Augmenter", "augmentation"),
    "preprocess": ("prepare",),
    "refusal": ("RefusalCode", "Refused"),
    "reporting": ("Algorithm", "Said", "structured_report"),
}


def __getattr__(name: str) -> object:
    """Imports what is asked for: the process that decodes needs neither torch nor highdicom, and starts in half a
    second without them."""
    if name not in __all__:
        raise AttributeError(name)
    place = next((place for place, names in _PLACES.items() if name in names), "volume")
    return getattr(import_module(f"common.imaging.{place}"), name)
