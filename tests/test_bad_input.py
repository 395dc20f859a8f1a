"""What a user sees when something is wrong: one clear paragraph, an exit code, and a folder as it was before."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedicom
from client import site as site_module
from client.train import Trained
from common.config import Phantom
from common.weights import Weights
from server.conclude import Circumstances
from simulations import run
from simulations.folder import alone_in
from simulations.phantoms import make_phantoms

SITES = ("east", "north", "south")
TINY = (
    "model.family=monai", "model.name=resnet10", "model.width=0.125", "model.stem=small", "data.size=[16,16]",
    "rounds=2", "federation.sites=3", "simulation.device=cpu", "simulation.threads=1", "evaluation.bootstraps=100",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "hospitals"
    make_phantoms(out, Phantom(patients=24, central_patients=20, size=24), len(SITES))
    return out


@pytest.fixture
def hospitals(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(made, tmp_path / "hospitals")
    return tmp_path / "hospitals"


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simulations.cli.show_conclusion", lambda *_: None)
    monkeypatch.setattr(run, "conclude", lambda federated, *_, **__: federated)


Fedicom = Callable[..., tuple[int, str, str]]


@pytest.fixture
def simulate(tmp_path: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> Fedicom:
    def call(*words: str, hospitals: Path = made, privacy: str = "none") -> tuple[int, str, str]:
        where = () if any(word.startswith("simulation.hospitals") for word in words) else (
            f"simulation.hospitals={hospitals}",
        )  # fmt: skip
        code = fedicom.main(["simulate", *TINY, f"privacy={privacy}", f"out={tmp_path / 'run'}", *where, *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def clear(told: tuple[int, str, str], code: int, *words: str) -> str:
    """One paragraph on stderr with these words, and nothing a user must not see."""
    got, _, err = told
    assert got == code
    assert err.startswith("fedicom: ")
    assert err.count("\n") == 1
    assert len(err) < 700
    assert "Traceback" not in err
    for patient in ("P000", ".dcm", "/dicom/"):
        assert patient not in err
    for word in words:
        assert word in err, err
    return err


def rewrite(table: Path, change: Callable[[list[str]], list[str]]) -> None:
    with table.open(newline="") as file:
        head, *rows = csv.reader(file)
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([head, *(change(row) for row in rows)])


# Data


def test_an_empty_folder_of_hospitals(simulate: Fedicom, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    clear(simulate(hospitals=tmp_path / "empty"), 2, "holds no hospital")
    assert not (tmp_path / "run").exists()


def test_no_folder_of_hospitals_at_all(simulate: Fedicom, tmp_path: Path) -> None:
    clear(simulate(hospitals=tmp_path / "absent"), 2, "is no folder", "fedicom hospitals")
    assert not (tmp_path / "run").exists()


def test_fractions_that_an_earlier_run_has_decided_otherwise_are_told_in_the_notes(
    simulate: Fedicom, hospitals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[tuple[str, ...]] = []

    def concluded(federated: object, *_: object, circumstances: Circumstances, **__: object) -> object:
        notes.append(circumstances.notes)
        return federated

    monkeypatch.setattr(run, "conclude", concluded)
    for out, fraction in (("first", 0.15), ("again", 0.15), ("other", 0.3)):
        words = ("rounds=1", f"out={tmp_path / out}", f"evaluation.validation_fraction={fraction}")
        assert simulate(*words, hospitals=hospitals)[0] == 0
    assert notes[:2] == [(), ()]
    (note,) = notes[2]
    for told in ("validation_fraction 0.3", "new patients only at east, north, south", "by 0.15 and 0.15"):
        assert told in note


def test_a_hospital_without_images(simulate: Fedicom, hospitals: Path, tmp_path: Path) -> None:
    shutil.rmtree(hospitals / "north" / "dicom")
    (hospitals / "north" / "dicom").mkdir()
    clear(simulate(hospitals=hospitals), 1, "north: ")
    assert not (tmp_path / "run").exists()


def test_a_hospital_without_labels_is_not_one(simulate: Fedicom, hospitals: Path, tmp_path: Path) -> None:
    (hospitals / "north" / "labels.csv").unlink()
    clear(
        simulate(hospitals=hospitals),
        2,
        "federation.sites is 3",
        "holds 2 hospitals",
        "north: no labels.csv",
        "federation.sites=2",
    )
    assert not (tmp_path / "run").exists()


def test_labels_that_match_nothing(simulate: Fedicom, hospitals: Path, tmp_path: Path) -> None:
    rewrite(hospitals / "north" / "labels.csv", lambda row: ["nobody" + row[0][-1:] + str(hash(row[0])), *row[1:]])
    clear(simulate(hospitals=hospitals), 1, "north: ")
    assert not (tmp_path / "run").exists()


def test_one_class_only(simulate: Fedicom, hospitals: Path, tmp_path: Path) -> None:
    rewrite(hospitals / "south" / "labels.csv", lambda row: [row[0], "nodule", *row[2:]])
    clear(simulate(hospitals=hospitals), 1, "south: ", "one class only", "of the other classes")
    assert not (tmp_path / "run").exists()


def test_a_site_with_three_patients(made: Path, simulate: Fedicom, tmp_path: Path) -> None:
    hospitals = tmp_path / "few"
    make_phantoms(hospitals, Phantom(patients=3, central_patients=10, size=24), 3)
    clear(simulate(hospitals=hospitals), 1, "patients with images and labels", "at least 5")
    assert not (tmp_path / "run").exists()


def test_another_number_of_sites(simulate: Fedicom, tmp_path: Path) -> None:
    clear(simulate("federation.sites=4"), 2, "federation.sites is 4", "holds 3 hospitals", "federation.sites=3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["server", "St. Mary's"])
def test_a_folder_whose_name_no_site_can_have(simulate: Fedicom, hospitals: Path, name: str) -> None:
    (hospitals / "north").rename(hospitals / name)
    told = clear(simulate(f"simulation.hospitals={hospitals}"), 2, "is no name for a site", "rename the folder")
    assert name in told


def test_a_public_data_recipe_without_its_hospitals_says_how_to_make_them(simulate: Fedicom) -> None:
    clear(
        simulate("simulation.hospitals=null", "task.classes=[normal,pneumonia]"),
        2,
        "simulation.hospitals: missing",
        "fedicom hospitals import",
    )


def test_baselines_without_a_central_set_are_refused_before_anything_is_trained(
    simulate: Fedicom, hospitals: Path, tmp_path: Path
) -> None:
    shutil.rmtree(hospitals / "central")
    clear(simulate("baselines=true", hospitals=hospitals), 2, "baselines=true", "no folder central/")
    assert not (tmp_path / "run").exists()


def test_phantoms_of_other_dimensions_than_the_task(simulate: Fedicom, tmp_path: Path) -> None:
    told = simulate("simulation.hospitals=null", "simulation.phantom.dimensions=3")
    clear(told, 2, "simulation.phantom.dimensions is 3", "the task has 2")
    assert not (tmp_path / "run").exists()


# Settings


def test_a_typo_is_answered_with_the_field_and_what_was_meant(simulate: Fedicom, tmp_path: Path) -> None:
    clear(simulate("training.batchsize=3"), 2, "batchsize")
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there(simulate: Fedicom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clear(simulate("simulation.device=cuda"), 2, "simulation.device is cuda", "torch sees no GPU")
    assert not (tmp_path / "run").exists()


# The folder of the run


def test_a_folder_with_other_files_is_left_as_it_is(simulate: Fedicom, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o755)
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    for words in ((), ("resume=true",), ("overwrite=true",)):
        clear(simulate(*words), 2, "holds other files (thesis.tex)", "empty folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_an_out_that_is_a_file(simulate: Fedicom, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    clear(simulate(), 2, "is a file")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_that_is_there_needs_resume_or_overwrite_and_is_not_touched_before(
    simulate: Fedicom, hospitals: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert simulate()[0] == 0

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}

    before = content()
    clear(simulate(), 2, "resume=true", "overwrite=true", "out=")
    clear(simulate("resume=true", "overwrite=true"), 2, "only one of them")
    clear(simulate("resume=true", "training.lr=0.5", "seed=9"), 2, "other settings", "recipe.seed, recipe.training.lr")
    clear(simulate("resume=true", hospitals=hospitals), 2, "other settings", "simulation.hospitals")
    shutil.rmtree(hospitals / "north")
    clear(simulate("overwrite=true", hospitals=hospitals), 2, "holds 2 hospitals")
    assert content() == before

    for name in ("model.int8.onnx", "model.ts.pt"):  # of a run that was asked for them
        (out / name).write_bytes(b"of the earlier weights")
    assert simulate("overwrite=true", "seed=9")[0] == 0
    assert "run resumed" not in (out / "audit" / "server.jsonl").read_text()
    assert content().keys() == before.keys()


def test_overwrite_removes_no_hospitals_that_fedicom_did_not_draw(
    simulate: Fedicom, hospitals: Path, tmp_path: Path
) -> None:
    own = tmp_path / "run" / "hospitals"
    own.parent.mkdir()
    hospitals.rename(own)
    (own / "hospitals.json").unlink()  # as hospitals of one's own have none
    assert simulate(hospitals=own)[0] == 0
    before = sorted(own.rglob("*"))
    told = simulate("overwrite=true", "simulation.hospitals=null", "simulation.phantom.patients=24")
    clear(told, 2, "run/hospitals holds other files; nothing was written")
    assert sorted(own.rglob("*")) == before


@pytest.mark.parametrize("inside", ["north/dicom", "north/dicom/runs/mine", "central/dicom/x"])
def test_a_run_writes_nothing_among_the_images_of_a_hospital(simulate: Fedicom, hospitals: Path, inside: str) -> None:
    before = sorted(hospitals.rglob("*"))
    clear(simulate(f"out={hospitals / inside}", hospitals=hospitals), 2, "lies inside the folder of images")
    assert sorted(hospitals.rglob("*")) == before


def test_a_run_writes_nothing_among_images_that_lie_beside_their_table(simulate: Fedicom, hospitals: Path) -> None:
    for patient in (hospitals / "north" / "dicom").iterdir():
        patient.rename(hospitals / "north" / patient.name)
    (hospitals / "north" / "dicom").rmdir()
    clear(simulate(f"out={hospitals / 'north' / 'run'}", hospitals=hospitals), 2, "lies inside the folder of images")
    assert not (hospitals / "north" / "run").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "\0"])
def test_a_damaged_run_json(simulate: Fedicom, tmp_path: Path, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    clear(simulate("resume=true"), 1, "run.json cannot be read")


def test_two_simulations_do_not_write_into_one_folder(simulate: Fedicom, tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        clear(simulate(), 2, "another simulation is writing into")
    assert simulate()[0] == 0


# Sites


def test_updates_that_are_not_numbers_leave_the_model_and_name_the_site(
    simulate: Fedicom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: object, weights: Weights, *_: object, **__: object) -> Trained:
        nan = Weights({name: np.full_like(array, np.nan) for name, array in weights.items()})
        return Trained(delta=nan, steps=1, loss=0.5)

    monkeypatch.setattr(site_module, "train", broken)
    clear(simulate(), 1, "round 1: 0 of 3 replies accepted", "quorum is 2", "the model is as it was", "'north'")
    assert list((tmp_path / "run").glob("checkpoints/*.safetensors")) == []


def test_a_divergence_says_what_to_lower(simulate: Fedicom) -> None:
    told = simulate("training.optimizer=sgd", "training.lr=1e30", "training.local_epochs=4")
    clear(told, 1, "round 1: 0 of 3 replies accepted", "not finite")


def test_sites_that_hold_another_recipe_refuse(simulate: Fedicom, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    real = run.coordinate
    monkeypatch.setattr(
        run, "coordinate", lambda recipe, *parts, **more: real(replace(recipe, seed=77), *parts, **more)
    )
    err = clear(simulate(), 1, "0 of 3 sites take part, quorum is 2. east, north, south refused: recipe ")
    assert err.count("not approved here") == 1
    assert "start the missing nodes" not in err


def test_where_all_sites_refuse_the_message_says_what_and_starts_no_node(simulate: Fedicom, tmp_path: Path) -> None:
    make_phantoms(tmp_path / "large", Phantom(patients=480, size=24), 3)  # 1 / 120 is less than .009
    words = ("privacy.delta=0.009", "model.norm=group")
    err = clear(simulate(*words, hospitals=tmp_path / "large", privacy="dp_sgd"), 1, "refused: delta: got 0.009")
    assert "nodes" not in err


def test_a_site_that_fails_before_the_first_round_is_told_by_its_name(
    simulate: Fedicom, tmp_path: Path, hospitals: Path
) -> None:
    words = ("simulation.workers=2", "federation.quorum=3")
    assert simulate(*words, hospitals=hospitals)[0] == 0
    log = tmp_path / "run" / "audit" / "north.jsonl"
    log.write_text(log.read_text().replace('"site started"', '"site stopped"'))
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()
    told = simulate(*words, "resume=true", hospitals=hospitals)
    clear(told, 1, "2 of 3 sites take part, quorum is 3. north failed: ", "simulation.log")


def test_a_site_that_crashes_tells_its_kind_of_error_and_the_log_has_the_rest(
    simulate: Fedicom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> Trained:
        raise RuntimeError("P00001 in a/dicom/b.dcm")

    monkeypatch.setattr(site_module, "train", crash)
    clear(simulate(), 1, "RuntimeError at the site; see its own log")
    assert "P00001" in (tmp_path / "run" / "simulation.log").read_text()
    assert "P00001" not in "".join(path.read_text() for path in (tmp_path / "run" / "audit").iterdir())


def test_a_changed_log_of_a_site_is_told_before_a_round(simulate: Fedicom, tmp_path: Path) -> None:
    assert simulate()[0] == 0
    log = tmp_path / "run" / "audit" / "north.jsonl"
    log.write_text(log.read_text().replace("site started", "site STARTED"))
    clear(simulate("resume=true"), 1, "north.jsonl", "it was changed")


# Disk and interruption


@pytest.mark.parametrize("privacy", ["none", "dp_sgd"])
@pytest.mark.parametrize("after", [0, 3, 9, 16, 24])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_space(
    simulate: Fedicom, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, after: int, privacy: str
) -> None:
    left = after

    def full(real: Callable[[int], None]) -> Callable[[int], None]:
        def flush(handle: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(handle)

        return flush

    words: tuple[str, ...] = ("privacy.epsilon=8", "privacy.delta=1e-3") if privacy != "none" else ()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full(os.fsync))
        patch.setattr(run, "to_system", full(run.to_system))  # what sites write has no fsync of its own
        clear(simulate(*words, privacy=privacy), 1, "No space left on device")
    assert list((tmp_path / "run").rglob(".*.tmp")) == []
    code, _, err = simulate(*words, "resume=true", privacy=privacy)
    assert (code, err) == (0, "")


def test_ctrl_c_says_how_to_go_on_and_the_rest_gives_the_same_weights(
    simulate: Fedicom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import checkpoint

    def digest(out: Path) -> str:
        (newest,) = sorted(out.glob("checkpoints/*.safetensors"))[-1:]
        return checkpoint._read(newest).weights.digest

    assert simulate(f"out={tmp_path / 'never'}")[0] == 0
    real, visits = site_module.train, 0

    def stop(*given: Any, **more: Any) -> Trained:
        nonlocal visits
        visits += 1
        if visits == 5:
            raise KeyboardInterrupt
        return real(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "train", stop)
        code, out, err = simulate()
    assert code == 130
    assert "resume=true goes on" in out
    assert err == "fedicom: stopped by you\n"
    assert simulate("resume=true")[0] == 0
    assert digest(tmp_path / "run") == digest(tmp_path / "never")


# What is shown


def test_without_a_terminal_there_are_plain_lines_and_no_bars(simulate: Fedicom) -> None:
    code, out, err = simulate("rounds=1")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("Recipe phantom_2d ")
    assert lines[0].endswith(": 1 round, 3 sites, no differential privacy")
    assert [line.split(",")[0] for line in lines if line.startswith("round ")] == ["round 1 of 1: 3 sites"]
    assert "\x1b" not in out
    assert "━" not in out
    assert max(map(len, lines)) < 140
