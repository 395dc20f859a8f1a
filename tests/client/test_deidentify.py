"""De-identified copies: markers are planted wherever a file can hold text, and looked for in the bytes of the copy."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from pydicom import dcmread
from pydicom.datadict import DicomDictionary, dictionary_VM, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    MRImageStorage,
    UltrasoundImageStorage,
)

from client.deidentify import deidentify_verb
from common.errors import ConfigError, StorageError
from common.imaging import FolderReading, read_folder
from common.imaging.confidentiality import ACTIONS, action
from common.imaging.deidentify import Deidentifier, Options
from common.imaging.refusal import Refusal, RefusalCode
from tests.common.test_imaging_multiframe import enhanced
from tests.common.test_imaging_tables import table

KEY = bytes(range(32))
MARKER = "ZQXJ"
TEXT_VRS = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT", "UR"}
STUDY, SERIES, SOP = "1.2.3.777.1", "1.2.3.777.2", "1.2.3.777.3"
IMAGE_YX = np.arange(48, dtype=np.uint16).reshape(6, 8)


def image(**more: Any) -> Dataset:
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = SOP
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = STUDY, SERIES, "1.2.3.777.4"
    made.PatientName, made.PatientID, made.PatientSex, made.PatientAge = "Doe^Jane", "MRN-1", "F", "093Y"
    made.StudyDate = made.AcquisitionDate = "20260301"
    made.StudyTime, made.Modality, made.Manufacturer, made.ConvolutionKernel = "101500", "CT", "SIEMENS", "B30f"
    made.ImageType, made.BodyPartExamined = ["ORIGINAL", "PRIMARY", "AXIAL"], "CHEST"
    made.ImagePositionPatient, made.ImageOrientationPatient = [1.5, -2, 3], [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.KVP, made.RescaleSlope, made.RescaleIntercept = [0.7, 0.7], "120", "1", "-1024"
    made.Rows, made.Columns, made.SamplesPerPixel, made.PhotometricInterpretation = 6, 8, 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = IMAGE_YX.tobytes()
    made["PixelData"].VR = "OW"
    for keyword, value in more.items():
        setattr(made, keyword, value)
    return made


def written(dataset: Dataset, path: Path) -> Path:
    dataset.save_as(path, enforce_file_format=True)
    return path


def copied(dataset: Dataset, path: Path, **options: Any) -> Dataset:
    return dcmread(BytesIO(Deidentifier(KEY, Options(**options)).copy(written(dataset, path)).data))


def plant(dataset: Dataset, *, everything: bool) -> int:
    """Puts the marker into every text attribute of the dictionary that is not there yet; returns how many."""
    planted = 0
    for tag, (vr, vm, _, _, keyword) in DicomDictionary.items():
        if vr not in TEXT_VRS or tag >> 16 in (0x0000, 0x0002, 0x0004) or not keyword:
            continue
        if not everything and planted > 60:
            break
        if everything or tag not in dataset:
            dataset.add(DataElement(tag, vr, [MARKER] * 2 if vm == "2" else MARKER))
            planted += 1
    return planted


def full_of_markers(path: Path) -> Path:
    made = image()
    keep = {keyword: made.get(keyword) for keyword in ("Modality", "PhotometricInterpretation")}
    assert plant(made, everything=True) > 1500
    for keyword, value in keep.items():
        setattr(made, keyword, value)
    for keyword in ("BurnedInAnnotation", "RecognizableVisualFeatures", "ConversionType", "SpecificCharacterSet"):
        delattr(made, keyword)
    inner, deeper = Dataset(), Dataset()
    plant(inner, everything=False)
    plant(deeper, everything=False)
    inner.PatientName = deeper.PatientName = MARKER
    inner.PixelMeasuresSequence = Sequence([deeper])
    for name in ("SharedFunctionalGroups", "ModalityLUT", "OtherPatientIDs", "RequestAttributes", "ReferencedImage",
                 "Content", "SourceImage", "AnatomicRegion", "ViewCode", "FrameAnatomy"):  # fmt: skip
        setattr(made, f"{name}Sequence", Sequence([inner]))
    block = made.private_block(0x0029, f"{MARKER} CREATOR", create=True)
    block.add_new(0x01, "LO", MARKER)
    block.add_new(0x02, "OB", MARKER.encode() * 2)
    made.add_new(0x60000010, "US", 6)
    made.add_new(0x60003000, "OW", MARKER.encode() * 8)
    made.add_new(0x60004000, "LT", MARKER)
    made.add_new(0x50003000, "OW", MARKER.encode())
    made.add_new(0x00420011, "OB", MARKER.encode())
    made.add_new(0x00282000, "OB", MARKER.encode())  # ICC Profile
    made.add_new(0x00091234, "UN", MARKER.encode())
    made.add_new(0xFFFCFFFC, "OB", MARKER.encode())
    made.PatientBirthDate, made.PatientTelephoneNumbers = "19330405", MARKER
    made.file_meta.SourceApplicationEntityTitle = made.file_meta.ImplementationVersionName = MARKER
    made.file_meta.PrivateInformationCreatorUID, made.file_meta.PrivateInformation = "1.2.3.777.5", MARKER.encode()
    out = BytesIO()
    made.save_as(out, enforce_file_format=True)
    data = out.getvalue()
    path.write_bytes(MARKER.encode() * 32 + data[128:] + b"\xfc\xff\xfc\xffOB\0\0\x04\0\0\0" + MARKER.encode())
    return path


@pytest.mark.parametrize("options", [{}, {"dates": "keep", "characteristics": True}, {"dates": "shift"}])
def test_no_planted_marker_is_in_the_bytes_or_names_of_a_copy(tmp_path, options):
    path = full_of_markers(tmp_path / f"{MARKER}.dcm")
    assert path.read_bytes().count(MARKER.encode()) > 1500
    copy = Deidentifier(KEY, Options(**options)).copy(path)
    assert MARKER.lower().encode() not in copy.data.lower()
    assert MARKER not in copy.name
    for hidden in (b"1.2.3.777", b"19330405", b"MRN", b"Doe"):
        assert hidden not in copy.data
    again = dcmread(BytesIO(copy.data))
    assert (again.pixel_array == IMAGE_YX).all()
    assert copy.data[:128] == bytes(128)


def test_the_command_copies_a_tree_under_new_names_and_says_nothing_of_a_patient(tmp_path, capsys):
    source = tmp_path / "in" / f"{MARKER}^JANE"
    source.mkdir(parents=True)
    written(image(), source / f"{MARKER}.dcm")
    written(image(BurnedInAnnotation="YES", SOPInstanceUID="1.2.3.777.9"), source / "text.dcm")
    (source / f"{MARKER}.txt").write_text(MARKER)
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--key-file", str(tmp_path / "key")]
    assert deidentify_verb([*words, "--make-key"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("1 image copied, 2 files refused\n  1 burned_in_text\n  1 not_dicom\n")
    assert MARKER not in said.out + said.err
    (copy,) = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert MARKER not in str(copy.relative_to(tmp_path))
    assert copy.stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="not empty"):
        deidentify_verb(words)
    with pytest.raises(ConfigError, match="lies in the other"):
        deidentify_verb([words[0], str(tmp_path / "in" / "out"), *words[2:]])


def test_a_copy_that_was_killed_leaves_nothing_that_looks_like_one_and_is_made_when_asked_for_again(
    tmp_path, monkeypatch
):
    (tmp_path / "in").mkdir()
    for at in range(2):
        written(image(SOPInstanceUID=f"1.2.3.777.{at}"), tmp_path / "in" / f"{at}.dcm")
    words = [str(tmp_path / "in"), str(tmp_path / "out"), "--key-file", str(tmp_path / "key")]
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    if (child := os.fork()) == 0:
        seen = []
        copy = Deidentifier.copy
        monkeypatch.setattr(
            Deidentifier, "copy", lambda self, path: os._exit(9) if seen else (seen.append(path), copy(self, path))[1]
        )
        deidentify_verb(words)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    assert deidentify_verb(words) == 0
    assert len(list((tmp_path / "out").rglob("*.dcm"))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "key", "out"]


def test_two_people_who_share_a_patient_id_are_not_copied_as_one(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    people = [
        ("MRN-1", "North"),
        ("MRN-2", "North"),
        ("MRN-1", ""),
        ("MRN-1", "South"),
        ("MRN-1", "North"),
        ("MRN-2", ""),
    ]
    for at, (patient, issuer) in enumerate(people):
        made = image(PatientID=patient, IssuerOfPatientID=issuer, SOPInstanceUID=f"1.2.3.777.{at}")
        made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
        written(made, tmp_path / "in" / f"{at}.dcm")
    assert deidentify_verb([str(tmp_path / "in"), str(tmp_path / "out"), "--key-file", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out.startswith("2 images copied, 4 files refused\n  4 shared_patient\n")
    copies = [dcmread(path) for path in (tmp_path / "out").rglob("*.dcm")]
    assert len({copy.PatientID for copy in copies}) == 1
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_different_files_that_claim_to_be_one_image_are_not_copied_and_a_copy_is_once(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    for at, (image_uid, slope) in enumerate([("1", "1"), ("1", "2"), ("1", "1"), ("2", "1"), ("2", "1")]):
        study = {"StudyInstanceUID": f"1.2.3.{image_uid}", "PatientID": f"MRN-{image_uid}"}
        written(image(SOPInstanceUID=f"1.2.3.777.{image_uid}", RescaleSlope=slope, **study), tmp_path / "in" / f"{at}")
    assert deidentify_verb([str(tmp_path / "in"), str(tmp_path / "out"), "--key-file", str(tmp_path / "key")]) == 0
    assert capsys.readouterr().out.startswith("1 image copied, 4 files refused\n  3 conflict\n  1 copy\n")
    assert len(list((tmp_path / "out").rglob("*"))) == 3  # a patient, a study, an image


def test_two_people_whose_ids_are_alike_where_they_cannot_be_read_are_not_copied_as_one(tmp_path):
    names = []
    for at, letter in enumerate((b"\xfc", b"\xf6")):  # Latin-1 in a file that says UTF-8
        made = image(PatientID="M?ller01", SpecificCharacterSet="ISO_IR 192", StudyInstanceUID=f"1.2.3.{at}")
        path = written(made, tmp_path / f"{at}.dcm")
        path.write_bytes(path.read_bytes().replace(b"M?ller01", b"M" + letter + b"ller01"))
        names.append(Deidentifier(KEY).copy(path).name.split("/")[0])
    assert len(set(names)) == 2


def test_a_key_that_others_can_read_is_refused(tmp_path):
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        deidentify_verb([str(tmp_path), str(tmp_path / "out"), "--key-file", str(tmp_path / "key")])


def test_uids_are_replaced_alike_everywhere_and_differ_under_another_key(tmp_path):
    item = Dataset()
    item.ReferencedSOPInstanceUID = SOP
    first = image()
    first.PerFrameFunctionalGroupsSequence = Sequence([Dataset()])
    first.PerFrameFunctionalGroupsSequence[0].FrameVOILUTSequence = Sequence([item])
    copy = copied(first, tmp_path / "a")
    other = copied(image(SOPInstanceUID="1.2.3.777.30"), tmp_path / "b")
    assert copy.StudyInstanceUID == other.StudyInstanceUID != STUDY
    assert copy.SOPInstanceUID != other.SOPInstanceUID
    inside = copy.PerFrameFunctionalGroupsSequence[0].FrameVOILUTSequence[0].ReferencedSOPInstanceUID
    assert inside == copy.SOPInstanceUID == copy.file_meta.MediaStorageSOPInstanceUID
    assert copy.SOPInstanceUID.startswith("2.25.")
    assert int(copy.SOPInstanceUID[5:]) < 2**128
    assert Deidentifier(bytes(32)).uid(SOP) != Deidentifier(KEY).uid(SOP) == copy.SOPInstanceUID
    assert copy.SOPClassUID == CTImageStorage


def test_the_copy_keeps_what_reading_needs_and_says_what_was_done(tmp_path):
    copy = copied(image(), tmp_path / "a")
    original = image()
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "KVP", "RescaleIntercept",
                    "ImageType", "BodyPartExamined", "Manufacturer", "ConvolutionKernel", "Modality"):  # fmt: skip
        assert copy[keyword].value == original[keyword].value, keyword
    assert copy.PatientIdentityRemoved == "YES"
    assert [each.CodeValue for each in copy.DeidentificationMethodCodeSequence] == ["113100"]
    assert copy.LongitudinalTemporalInformationModified == "REMOVED"
    assert (copy.PatientName, copy.PatientSex, copy.StudyDate) == ("", "", "")
    assert "PatientAge" not in copy
    assert len(copy.PatientID) == 16


@pytest.mark.parametrize(
    ("value", "scheme", "stays"),
    [("T-D3000", "SRT", "Thorax"), ("T-D3000", "SNM3", "Thorax"), ("51185008", "SCT", "Thorax"),
     ("C86043", "NCIt", "erect"), ("T-D3000", "99HOUSE", None), (MARKER, "SCT", None)],
)  # fmt: skip
def test_concepts_of_the_standard_stay_in_its_own_words_and_others_go(tmp_path, value, scheme, stays):
    concept, modifier = Dataset(), Dataset()
    concept.CodeValue, concept.CodingSchemeDesignator, concept.CodeMeaning = value, scheme, MARKER
    modifier.CodeValue, modifier.CodingSchemeDesignator, modifier.CodeMeaning = "C86043", "NCIt", MARKER
    concept.MappingResourceName, concept.ViewModifierCodeSequence = MARKER, Sequence([modifier])
    made = image(AnatomicRegionSequence=Sequence([concept]), StudyDescription=stays or MARKER)
    data = Deidentifier(KEY).copy(written(made, tmp_path / "a")).data
    assert MARKER.encode() not in data
    kept = dcmread(BytesIO(data)).AnatomicRegionSequence
    assert [(each.CodeValue, each.CodingSchemeDesignator, each.CodeMeaning) for each in kept] == (
        [(value, scheme, stays)] if stays else []
    )
    assert [each.ViewModifierCodeSequence[0].CodeMeaning for each in kept] == ["erect"] * len(kept)


def test_what_an_object_must_have_stays_without_a_value_or_with_a_dummy(tmp_path):
    made = image(PositionReferenceIndicator=MARKER, PositionerType=MARKER, SoftwareVersions=MARKER, ContentTime="1015")
    copy = copied(made, tmp_path / "a")
    assert (copy.PositionReferenceIndicator, copy.PositionerType, copy.ContentTime) == ("", "", "")
    assert "SoftwareVersions" not in copy  # of type 1 in enhanced objects alone
    made = enhanced([0.0, 1.0])
    made.SoftwareVersions, made.Manufacturer, made.ContentTime, made.ContentDate = MARKER, MARKER, "1015", "20260301"
    copy = copied(made, tmp_path / "c")
    assert (copy.SoftwareVersions, copy.Manufacturer) == ("ANONYMIZED", "ANONYMIZED")
    assert (copy.ContentDate, copy.ContentTime) == ("19000101", "000000")
    copy = copied(made, tmp_path / "c", dates="keep")
    assert (copy.ContentDate, copy.ContentTime) == ("20260301", "1015")


def test_words_by_which_the_reader_tells_images_apart_stay(tmp_path):
    for kind in ("LOCALIZER", "SCOUT", "MOSAIC", "RECON TOMO"):
        copy = copied(image(ImageType=["ORIGINAL", "PRIMARY", kind, MARKER]), tmp_path / "a")
        assert list(copy.ImageType)[:3] == ["ORIGINAL", "PRIMARY", kind]
        assert re.fullmatch("OTHER_[0-9A-F]{10}", copy.ImageType[3])
    content, frame = Dataset(), Dataset()
    for stack, kept in (("2", "2"), (MARKER, "[0-9a-f]{16}")):
        content.StackID = stack
        frame.FrameContentSequence = Sequence([content])
        copy = copied(image(PerFrameFunctionalGroupsSequence=Sequence([frame])), tmp_path / "a")
        assert re.fullmatch(kept, copy.PerFrameFunctionalGroupsSequence[0].FrameContentSequence[0].StackID)


def private(group: int, creator: str, element: int, value: int) -> Callable[[Dataset], None]:
    return lambda made: made.private_block(group, creator, create=True).add_new(element, "IS", str(value))


def repeated(folder: Path, tell: Callable[[int], dict[str, Any]], sop_class: str) -> None:
    """Two repeats of a stack of four slices, in one series."""
    folder.mkdir()
    for k in (1, 2):
        for z in range(4):
            made = image(ImagePositionPatient=[0, 0, 2.0 * z], SOPInstanceUID=f"1.2.3.777.{k}.{z}", SliceThickness=2)
            made.PixelData = (IMAGE_YX + np.uint16(1000 * k + 100 * z)).tobytes()
            made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = sop_class
            made.Modality = "CT" if sop_class == CTImageStorage else "MR"
            for keyword, value in tell(k).items():
                value(made) if callable(value) else setattr(made, keyword, value)
            written(made, folder / f"{k}{z}.dcm")


def lut(unit: str) -> Sequence:
    (item,) = table(4096, 0, 16, range(4096))
    item.ModalityLUTType = unit
    return Sequence([item])


def found(reading: FolderReading) -> tuple[list[list[int]], list[str]]:
    volumes = sorted(volume.values_ZYX[:, 0, 0].astype(int).tolist() for volume in reading.volumes)
    return volumes, sorted(str(refused.code) for refused in reading.refused)


@pytest.mark.parametrize(
    ("tell", "divides"),
    [
        (lambda k: {"SequenceName": f"*ep_b{500 * k}t"}, True),
        (lambda k: {"SequenceName": f"{MARKER}^{k}"}, True),
        (lambda k: {"SequenceName": f"ep_b{k}", "x": private(0x0019, "SIEMENS MR HEADER", 0x0C, 500 * k)}, True),
        (lambda k: {"x": private(0x0019, "SIEMENS MR HEADER", 0x0C, 500 * k)}, True),
        (lambda k: {"x": private(0x0043, "GEMS_PARM_01", 0x39, 500 * k), "SequenceName": "ep2d"}, True),
        (lambda k: {"x": private(0x2001, "Philips Imaging DD 001", 0x03, 500 * k)}, True),
        (lambda k: {"ImageType": ["DERIVED", "PRIMARY", "DIXON", ("W", "F")[k - 1]]}, True),
        (lambda k: {"ImageType": ["ORIGINAL", "PRIMARY", "M", ("out phase", "in phase")[k - 1]]}, True),
        (lambda k: {"EchoTime": 2.5 * k}, True),
        (lambda k: {"SequenceName": "*ep_b500t"}, False),
    ],
)  # fmt: skip
def test_a_copy_of_an_mr_is_divided_into_stacks_as_its_original_is(tmp_path, tell, divides):
    repeated(tmp_path / "original", tell, MRImageStorage)
    _same(tmp_path, divides)


@pytest.mark.parametrize(
    ("tell", "divides"),
    [
        (lambda k: {"ConvolutionKernel": ("B30f", "B70f")[k - 1]}, True),
        (lambda k: {"ConvolutionKernel": ["I31f", str(k)]}, True),
        (lambda k: {"ConvolutionKernel": ("Body Soft", "Lung Enhanced")[k - 1]}, True),
        (lambda k: {"ConvolutionKernel": ["I31f", f"{MARKER} {k}"]}, True),
        (lambda k: {"ConvolutionKernel": MARKER, "RescaleType": MARKER}, False),
        (lambda k: {"SequenceName": f"{k}", "RescaleType": "hu"}, True),
        (lambda k: {"KVP": 60 + 20 * k, "ModalityLUTSequence": lut("HU")}, True),
        (lambda k: {"KVP": 60 + 20 * k, "ModalityLUTSequence": lut("MGML")}, False),
        (lambda k: {"KVP": 60 + 20 * k, "ModalityLUTSequence": lut(MARKER)}, False),
    ],
)
def test_a_copy_of_a_ct_is_divided_into_stacks_as_its_original_is(tmp_path, tell, divides):
    repeated(tmp_path / "original", tell, CTImageStorage)
    _same(tmp_path, divides)


def test_a_copy_of_heart_phases_in_one_file_is_divided_as_its_original_is(tmp_path):
    made = enhanced([0, 2, 0, 2])
    del made.DimensionIndexSequence
    for k, frame in enumerate(made.PerFrameFunctionalGroupsSequence):
        del frame.FrameContentSequence
        frame.CardiacSynchronizationSequence = Sequence([Dataset()])
        frame.CardiacSynchronizationSequence[0].NominalCardiacTriggerDelayTime = 100.0 * (k // 2)
    (tmp_path / "original").mkdir()
    written(made, tmp_path / "original" / "a.dcm")
    _same(tmp_path, True)


def _same(folder: Path, divides: bool) -> None:
    deidentifier = Deidentifier(KEY)
    for path in (folder / "original").iterdir():
        copy = deidentifier.copy(path)
        assert MARKER.encode() not in copy.data
        assert dcmread(BytesIO(copy.data))  # and nothing private, which `copy` itself looks at
        target = folder / "copy" / copy.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(copy.data)
    original, copied_ = found(read_folder(folder / "original")), found(read_folder(folder / "copy"))
    assert original == copied_
    assert len(original[0]) == 2 * divides


@pytest.mark.parametrize("modality", ["PX", "RG", "IVUS", "OT", "EC", MARKER])
def test_a_copy_keeps_a_modality_of_the_standard_by_which_recipes_choose(tmp_path, modality):
    made = image(Modality=modality, SOPClassUID=DigitalXRayImageStorageForPresentation)
    assert copied(made, tmp_path / "a").get("Modality") == (None if modality == MARKER else modality)


def test_dates_and_characteristics_stay_only_when_asked_for_and_the_file_says_so(tmp_path):
    copy = copied(image(), tmp_path / "a", dates="keep", characteristics=True)
    assert (copy.StudyDate, copy.StudyTime, copy.PatientSex, copy.PatientAge) == ("20260301", "101500", "F", "090Y")
    assert [each.CodeValue for each in copy.DeidentificationMethodCodeSequence] == ["113100", "113106", "113108"]
    assert copy.LongitudinalTemporalInformationModified == "UNMODIFIED"
    first = copied(image(), tmp_path / "b", dates="shift")
    later = copied(image(StudyDate="20260311"), tmp_path / "c", dates="shift")
    assert first.StudyDate < "20260301"
    assert int(np.datetime64(_iso(later.StudyDate)) - np.datetime64(_iso(first.StudyDate)) == 10)
    assert first.LongitudinalTemporalInformationModified == "MODIFIED"
    assert [each.CodeValue for each in first.DeidentificationMethodCodeSequence] == ["113100", "113107"]


def _iso(day: str) -> str:
    return f"{day[:4]}-{day[4:6]}-{day[6:]}"


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"BurnedInAnnotation": "YES"}, RefusalCode.BURNED_IN_TEXT),
        ({"SOPClassUID": UltrasoundImageStorage}, RefusalCode.BURNED_IN_TEXT),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, RefusalCode.BURNED_IN_TEXT),
        ({"ImageType": "SCREENSHOT"}, RefusalCode.BURNED_IN_TEXT),
        ({"ConversionType": "DF"}, RefusalCode.BURNED_IN_TEXT),
        ({"RecognizableVisualFeatures": "YES"}, RefusalCode.BURNED_IN_TEXT),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, RefusalCode.UNSUPPORTED_CLASS),
        ({"PixelData": bytes(10)}, RefusalCode.TRUNCATED),
    ],
)
def test_what_may_show_text_or_is_not_whole_is_refused(tmp_path, more, code):
    with pytest.raises(Refusal) as refused:
        Deidentifier(KEY).copy(written(image(**more), tmp_path / "a"))
    assert refused.value.code in (code, RefusalCode.CORRUPT if code is RefusalCode.TRUNCATED else code)


def test_bits_above_those_stored_are_cleared(tmp_path):
    marked = IMAGE_YX | np.uint16(0xF000)  # an overlay in the unused bits
    copy = copied(image(PixelData=marked.tobytes()), tmp_path / "a")
    assert (np.frombuffer(copy.PixelData, "<u2") == IMAGE_YX.ravel()).all()


def test_a_padding_value_beyond_the_bits_stored_stays_padding_in_a_copy(tmp_path):
    def padded(made: Dataset) -> None:
        stored = np.frombuffer(made.PixelData, "<i2").copy()
        stored[1] = -3024
        made.PixelData, made.PixelRepresentation = stored.tobytes(), 1
        made.add_new("PixelPaddingValue", "SS", -3024)

    repeated(tmp_path / "original", lambda k: {"AcquisitionNumber": k, "x": padded}, MRImageStorage)
    _same(tmp_path, True)
    first, *_ = read_folder(tmp_path / "copy").volumes
    assert first.values_ZYX[0, 0, 1] == first.values_ZYX.min()


def test_a_comment_inside_a_compressed_image_does_not_survive(tmp_path):
    packed = imagecodecs.jpeg8_encode(np.arange(64, dtype=np.uint8).reshape(8, 8), level=95)
    comment = b"\xff\xfe" + (2 + len(MARKER)).to_bytes(2, "big") + MARKER.encode()
    made = image(Rows=8, BitsAllocated=8, BitsStored=8, HighBit=7)
    made.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    made.PixelData = encapsulate([packed[:2] + comment + packed[2:]])
    made["PixelData"].VR = "OB"
    path = written(made, tmp_path / "a")
    assert MARKER.encode() in path.read_bytes()
    copy = Deidentifier(KEY).copy(path)
    assert MARKER.encode() not in copy.data
    again = dcmread(BytesIO(copy.data))
    assert again.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert (again.pixel_array == imagecodecs.jpeg8_decode(packed)).all()


def test_the_table_says_what_the_standard_says():
    # checked from memory, not against the published page of PS3.15 table E.1-1
    said = {"AccessionNumber": "Z", "AcquisitionComments": "X", "AcquisitionDate": "X/Z", "ContentDate": "Z/D",
            "ContainerIdentifier": "D", "DetectorID": "X/D", "DeviceUID": "U", "DeviceSerialNumber": "X/Z/D",
            "DimensionOrganizationUID": "U", "ClinicalTrialSiteID": "Z", "PatientName": "Z", "PatientAge": "X",
            "ReferencedImageSequence": "X/Z/U*", "StudyInstanceUID": "U", "InstitutionAddress": "X"}  # fmt: skip
    assert {keyword: ACTIONS[int(Tag(keyword))] for keyword in said} == said
    assert len(ACTIONS) == 652
    assert [action(Tag(tag)) for tag in (0x50020010, 0x60003000, 0x60024000, 0x00091001, 0x60000010, 0x00280010)] == [
        "X", "X", "X", "X", None, None,
    ]  # fmt: skip


def test_every_replaced_attribute_of_the_table_has_a_dummy_or_is_left_out(tmp_path):
    made = image()
    for tag, code in ACTIONS.items():
        try:
            vr = dictionary_VR(tag)
        except KeyError:
            continue
        if code in ("D", "Z", "Z/D", "X/Z/D") and vr in TEXT_VRS and dictionary_VM(tag) in ("1", "1-n"):
            made.add(DataElement(tag, vr, MARKER))
    made.PatientID = MARKER
    copy = copied(made, tmp_path / "a")
    assert copy.ClinicalTrialProtocolID == "ANONYMIZED"
    assert copy.AccessionNumber == ""
