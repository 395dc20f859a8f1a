"""`fedicom predict`: a model file and a folder of DICOM become two tables, and DICOM reports on request, on the user's
own machine."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, DataError
from common.imaging import (
    Algorithm,
    Image,
    Refused,
    Said,
    Source,
    Volume,
    iterate_folder,
    prepare,
    structured_report,
)  # fmt: skip
from common.onnx_model import STATEMENT, OnnxModel
from common.storage import commit, private_folder, storing, write_whole

Array = npt.NDArray[np.float32]

_BATCH_NUMBERS = 2**24  # 64 MiB of float32 prepared at a time, however large one sample is
_BATCH_MOST = 32
_MULTILABEL_CUT = 0.5  # as in common.metrics
# What Excel and LibreOffice take for a formula (OWASP "CSV Injection"), also behind blanks and in full width
_FORMULA = re.compile(r"\s*[=+\-@\t\r\n＝＋－＠]|[\t\r\n]")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was predicted; counts only, the tables hold the rest."""

    samples: int
    patients: int
    """By Patient ID and issuer."""
    nameless: int
    """Samples without a Patient ID that can be read: how many patients they show is not known."""
    positive: int | None
    """Samples at or above the operating threshold; None where the file holds none."""
    refused: dict[str, int]
    """Reason code -> number of files that were not used."""
    path: Path
    refused_path: Path
    reports: int = 0
    """DICOM Structured Reports that were written."""
    model_sha256: str


def predict(
    model_path: Path,
    dicom_dir: Path,
    out_csv: Path,
    *,
    reports: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Runs a model that Fedicom exported over every image of a folder.

    The preprocessing is the one embedded in the file. `out_csv` gets one row a sample, in the
    order of `common.imaging.iterate_folder`: identifiers as in the images, the probability of
    each class, the predicted class (multi-label: all above one half, joined by `;`), and for binary
    tasks whether the operating point is reached. `<out>.refused.csv` gets one row for each file that
    was not used. Both hold patient data: mode 0600, whole or absent, and no predictions without their refusals.
    A cell that a spreadsheet would run as a formula is written with a leading apostrophe.

    Args:
        reports: A folder that gets a DICOM Structured Report for each sample, named in the table's last column; whole
            or absent as the tables are. A sample whose header makes no valid one keeps its row, and its files are among
            the refusals with the code `no_report`.
        progress: Told (files done, files in all).

    Raises:
        ConfigError: `out_csv` or `reports` lies inside `dicom_dir`, a table's name is a folder's, or `reports` is no
            empty folder.
        ModelFileError: The model is unreadable or was not exported by Fedicom.
        DataError: No image of the folder can be used; the refusals are written all the same.
        StorageError: A table cannot be written.
    """
    model = OnnxModel(model_path)
    if not dicom_dir.is_dir():
        what = "is a file" if dicom_dir.exists() else "does not exist"
        raise DataError(f"the folder of DICOM images {what}; give the folder that holds them")
    for path in (out_csv, reports):
        if path is not None and path.resolve().is_relative_to(dicom_dir.resolve()):
            raise ConfigError("the output lies inside the folder of images; choose a place beside it")
    refused_csv = out_csv.with_name(f"{out_csv.stem}.refused.csv")
    for path in (out_csv, refused_csv):
        if path.is_dir():  # now: it would be found when all is predicted
            raise ConfigError(f"{path} is a folder, and a table is to be written there; give the name of a file")
    with ExitStack() as open_tables:
        # Entered first, so it takes its name last: predictions never stand there without their refusals
        table = open_tables.enter_context(_table(out_csv))
        refusals = open_tables.enter_context(_table(refused_csv))
        shelf = open_tables.enter_context(_shelf(reports, model)) if reports is not None else None
        run = _Run(model, dicom_dir, table, refusals, shelf)
        run.over(iterate_folder(dicom_dir, progress, correct_tilt=run.data.correct_tilt))
        if run.samples:
            table.keep = True
            if shelf is not None:
                shelf.keep = True
        refusals.keep = True
    if not run.samples:
        raise DataError(
            f"no image of the folder can be used by this {model.description.task.dimensions}D model; files refused: "
            f"{dict(run.refused) or 'none, the folder is empty'}; see {refused_csv.name}"
        )
    return Predictions(
        samples=run.samples,
        patients=sum(max(1, len(issuers)) for issuers in run.patients.values()),
        nameless=run.nameless,
        positive=None if run.threshold is None else run.positive,
        refused=dict(sorted(run.refused.items())),
        path=out_csv,
        refused_path=refused_csv,
        reports=shelf.count if shelf is not None else 0,
        model_sha256=model.sha256,
    )


class _Table:
    """A CSV file in the making."""

    def __init__(self, out: TextIO, name: str) -> None:
        self._writer = csv.writer(out, lineterminator="\n")
        self._name = name
        self.keep = False

    def row(self, *cells: str) -> None:
        with storing(self._name):
            self._writer.writerow([_harmless(cell) for cell in cells])


class _Run:
    """One pass over a folder; holds one batch of prepared samples."""

    def __init__(
        self, model: OnnxModel, folder: Path, table: _Table, refusals: _Table, shelf: _Shelf | None = None
    ) -> None:
        self.model, self.folder, self.table, self.refusals, self.shelf = model, folder, table, refusals, shelf
        self.task, self.data = model.description.task, model.description.data
        self.threshold = model.description.operating_threshold if self.task.kind == "binary" else None
        self.samples = self.positive = self.nameless = 0
        self.patients: dict[str, set[str]] = {}  # Patient ID -> its issuers
        self.refused: Counter[str] = Counter()
        self._batch: list[tuple[Volume | Image, Array]] = []
        self._batch_size = max(1, min(_BATCH_MOST, _BATCH_NUMBERS // int(np.prod(self.data.size))))
        table.row(
            *("patient", "issuer", "study", "series", "instance", "frame", "accession", "modality"),
            *(f"probability_{name}" for name in self.task.classes),
            *("predicted", "above_operating_point"),
            *(("report",) if shelf is not None else ()),
        )
        refusals.row("file", "code", "why")

    def over(self, items: Iterator[Volume | Image | Refused]) -> None:
        for item in items:
            if isinstance(item, Refused):
                self._refuse((item.path,), str(item.code), item.why)
                continue
            problem = self._unsuitable(item)
            if problem is None:
                try:
                    x = prepare(item, self.data)
                except DataError as error:
                    problem = ("not_preparable", str(error))
                else:
                    if not np.isfinite(x).all():
                        problem = ("not_finite", "the prepared image holds numbers that are not finite")
            if problem is not None:
                self._refuse(item.source.files, *problem)
                continue
            self._batch.append((item, x))
            if len(self._batch) == self._batch_size:
                self._flush()
        self._flush()

    def _unsuitable(self, item: Volume | Image) -> tuple[str, str] | None:
        dimensions = 3 if isinstance(item, Volume) else 2
        if dimensions != self.task.dimensions:
            return "wrong_dimensions", f"a {dimensions}D image; the model takes {self.task.dimensions}D ones"
        modality, wanted = item.source.modality, self.data.modalities
        if wanted and modality not in wanted:
            return "other_modality", f"modality {modality or 'not given'}; the model was trained on {', '.join(wanted)}"
        return None

    def _refuse(self, files: Sequence[Path], code: str, why: str) -> None:
        self.refused[code] += len(files)
        for path in files:
            shown = path.relative_to(self.folder) if path.is_relative_to(self.folder) else path
            self.refusals.row(str(shown), code, why)

    def _flush(self) -> None:
        if not self._batch:
            return
        _, probabilities_NC = self.model.run(np.stack([x for _, x in self._batch]))
        for (item, _), probability_C in zip(self._batch, probabilities_NC, strict=True):
            if np.isfinite(probability_C).all():
                self._write(item, probability_C)
            else:
                self._refuse(item.source.files, "not_finite", "the model's output is not finite")
        # Pixels are let go here; the reader holds one item at a time
        self._batch.clear()

    def _write(self, item: Volume | Image, probability_C: Array) -> None:
        source, classes = item.source, self.task.classes
        reached = None
        if self.threshold is not None:
            reached = float(probability_C[1]) >= self.threshold
            self.positive += reached
        of_class = [(name, float(p)) for name, p in zip(classes, probability_C, strict=True)]
        if self.task.kind == "multilabel":
            predicted = tuple(name for name, p in of_class if p > _MULTILABEL_CUT)
        else:
            predicted = (classes[int(probability_C.argmax())],)
        report: tuple[str, ...] = ()
        if self.shelf is not None:
            try:
                report = (self.shelf.put(source, tuple(of_class), predicted, reached),)
            except DataError as error:
                self._refuse(source.files, "no_report", str(error))
                report = ("",)
        self.samples += 1
        if source.patient_id:
            self.patients.setdefault(source.patient_id, set()).update(filter(None, [source.issuer]))
        else:
            self.nameless += 1
        self.table.row(
            source.patient_id,
            source.issuer,
            source.study_uid,
            source.series_uid,
            # of a volume its first slice: a series of two echoes, and a file of two stacks, are two volumes
            source.sop_uids[0],
            *map(str, source.frames[:1] or [""]),
            source.accession,
            source.modality,
            *(f"{p:.7f}" for _, p in of_class),
            ";".join(predicted),
            {None: "", True: "yes", False: "no"}[reached],
            *report,
        )


class _Shelf:
    """A folder of DICOM Structured Reports in the making."""

    def __init__(self, folder: Path, model: OnnxModel) -> None:
        about = model.description
        self._folder, self._of_study, self.count, self.keep = folder, Counter[str](), 0, False
        name = str(json.loads(about.recipe)["name"])
        parameters = (f"model file SHA-256 {model.sha256}", f"recipe {about.recipe_id}", STATEMENT)
        self._algorithm = Algorithm(
            name=name, version=f"Fedicom {about.version}", weights=about.weight_digest, parameters=parameters
        )

    def put(
        self,
        source: Source,
        probabilities: tuple[tuple[str, float], ...],
        predicted: tuple[str, ...],
        above: bool | None,
    ) -> str:
        """Writes a report; gives the name of its file."""
        said = Said(probabilities=probabilities, predicted=predicted, above=above)
        report = structured_report(source, said, self._algorithm, number=self._of_study[source.study_uid] + 1)
        self._of_study[source.study_uid] += 1
        self.count += 1
        name = f"{report.SOPInstanceUID}.dcm"
        data = BytesIO()
        report.save_as(data)
        write_whole(self._folder / name, data.getvalue())
        return name


@contextmanager
def _shelf(folder: Path, model: OnnxModel) -> Iterator[_Shelf]:
    """A folder that gets its name when the block ends well and `keep` was set; else nothing is left of it."""
    with storing(folder.name):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is no empty folder; choose another one for the reports")
        folder.parent.mkdir(parents=True, exist_ok=True)
    part = private_folder(folder.with_name(f".{folder.name}.{os.getpid()}.tmp"))
    try:
        shelf = _Shelf(part, model)
        yield shelf
        if shelf.keep:
            with storing(folder.name):
                part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _table(path: Path) -> Iterator[_Table]:
    """A CSV file that gets its name when the block ends well and `keep` was set; else nothing is left of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with storing(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        # backslashreplace: a file name need not be text
        out = os.fdopen(handle, "w", encoding="utf-8", newline="", errors="backslashreplace")
        try:
            table = _Table(out, path.name)
            yield table
            with storing(path.name):
                out.flush()
                os.fsync(out.fileno())
        finally:
            with suppress(OSError):  # a full disk fails the flush again on closing; it was reported
                out.close()
        if table.keep:
            with storing(path.name):
                commit(part, path)
    finally:
        part.unlink(missing_ok=True)


def _harmless(cell: str) -> str:
    return "'" + cell if _FORMULA.match(cell) else cell
