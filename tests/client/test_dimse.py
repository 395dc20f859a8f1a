"""Pulling by C-GET from a PACS on loopback that keeps to itself what kind each image is (SOP Class UID is optional)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pynetdicom import AE, AllStoragePresentationContexts, evt

from client.dimse import FIND, GET, Dimse
from client.pacs import pull
from client.pacs_source import Asked, DimsePacs, Pace, Patience
from client.pacs_store import Store
from common.imaging.header import KINDS
from common.imaging.received import SYNTAXES, image_classes

STUDY = "1.2.826.0.1.7"
PATIENCE = Patience(2, 0.0, sleep=lambda _: None)
Serve = Callable[[list[Dataset]], DimsePacs]


def image(number: int, modality: str, sop_class: str) -> Dataset:
    """The only image of its series."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = sop_class
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = f"{STUDY}.{number}.1"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.Modality = STUDY, f"{STUDY}.{number}", modality
    made.StudyDate, made.PatientID = "20260102", "P"
    made.Rows = made.Columns = 2
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 8, 8, 7, 0
    made.PixelData = bytes(4)
    return made


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Any] = []

    def start(images: list[Dataset]) -> DimsePacs:
        def held(asked: Dataset) -> list[Dataset]:
            keys = [key for key in ("SeriesInstanceUID", "SOPInstanceUID") if asked.get(key)]
            return [each for each in images if all(each[key].value == asked[key].value for key in keys)]

        def find(event: Any) -> Iterator[tuple[int, Dataset | None]]:
            levels = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
            told = {each[levels[event.identifier.QueryRetrieveLevel]].value: each for each in held(event.identifier)}
            for each in told.values():
                answer = Dataset()
                for element in event.identifier:
                    known = element.keyword in each and element.keyword != "SOPClassUID"
                    setattr(answer, element.keyword, each[element.keyword].value if known else None)
                answer.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
                yield 0xFF00, answer

        def get(event: Any) -> Iterator[Any]:
            found = held(event.identifier)
            yield len(found)
            yield from ((0xFF00, each) for each in found)

        entity = AE(ae_title="ARCHIVE")
        entity.supported_contexts = [
            context for context in AllStoragePresentationContexts if context.abstract_syntax in KINDS
        ]  # fmt: skip
        for context in entity.supported_contexts:
            context.transfer_syntax, context.scu_role, context.scp_role = list(SYNTAXES), True, True
        entity.add_supported_context(FIND)
        entity.add_supported_context(GET)
        handlers = [(evt.EVT_C_FIND, find), (evt.EVT_C_GET, get)]
        server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
        running.append(server)
        return DimsePacs(
            kind="dimse", host="127.0.0.1", port=server.socket.getsockname()[1], called_ae="ARCHIVE", unsafe_no_tls=True
        )

    yield start
    for server in running:
        server.shutdown()


def fetched(pacs: DimsePacs, folder: Path, *modalities: str) -> tuple[int, int]:
    """How many images came, and how many did not."""
    source, store = Dimse(pacs, folder, PATIENCE), Store(folder / "out", b"k" * 32, Pace(None))
    asked = Asked(modalities=modalities, since=date(2026, 1, 1), until=date(2026, 1, 31))
    try:
        pulled = pull(source, store, asked, PATIENCE, lambda *_: None)
        return store.fetched, pulled.refused
    finally:
        store.close()
        source.close()


MODALITIES = {
    "CT": "CT", "MR": "MR", "Positron": "PT", "PET": "PT", "Nuclear": "NM", "Computed Radiography": "CR",
    "Mammography": "MG", "Intra-Oral": "IO", "Digital X-Ray": "DX", "Angiographic": "XA", "Radiofluoroscopic": "RF",
    "Ultrasound": "US",
}  # fmt: skip


def modality(sop_class: str) -> str:
    name = uid.UID(sop_class).name
    return next(code for word, code in MODALITIES.items() if word in name)


def test_every_kind_of_image_that_is_read_comes_from_a_pacs_that_does_not_say_what_it_holds(serve, tmp_path):
    images = [image(number, modality(each), each) for number, each in enumerate(KINDS)]
    assert fetched(serve(images), tmp_path, *dict.fromkeys(MODALITIES.values())) == (len(KINDS), 0)


def test_series_of_a_modality_that_says_nothing_come_by_several_associations(serve, tmp_path):
    kinds = uid.CTImageStorage, uid.DigitalXRayImageStorageForProcessing, uid.UltrasoundImageStorage
    images = [image(number, "OT", each) for number, each in enumerate(kinds)]
    assert fetched(serve(images), tmp_path, "OT") == (3, 0)


def test_one_association_is_enough_for_a_modality_that_is_known():
    for each in MODALITIES.values():  # PS3.8 9.3.2: 128 contexts, of which C-GET itself takes one
        assert len(image_classes(each)) * len(SYNTAXES) < 128
