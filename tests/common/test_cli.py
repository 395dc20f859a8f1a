"""The front door, and the verbs that need neither side."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fedicom
from common import imports
from common.audit import AuditLog
from common.config import load_recipe, recipe_from_json
from common.errors import FedicomError
from common.identity import Signer

ROOT = Path(fedicom.__file__).parent


def run(*words: str, capsys) -> tuple[int, str, str]:
    try:
        code = fedicom.main(words)
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_an_error_that_quotes_others_does_not_move_the_cursor(monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise FedicomError("network x\x1b[2J\x9b31m\u202e\nask for another")

    monkeypatch.setattr(imports, "call", fail)
    code, _, err = run("recipe", "show", capsys=capsys)
    assert (code, err) == (1, "fedicom: network x [2J 31m \nask for another\n")


def test_recipe_show_prints_yaml_that_is_the_recipe_and_its_id(capsys):
    code, out, _ = run("recipe", "show", "rounds=3", capsys=capsys)
    recipe = load_recipe(["rounds=3"])
    assert code == 0
    assert out.endswith(f"# id {recipe.id}\n")
    import json

    assert recipe_from_json(json.dumps(yaml.safe_load(out))) == recipe


@pytest.mark.parametrize("words", [[], ["fly"], ["recipe"], ["recipe", "hide"], ["audit"], ["version", "x"]])
def test_a_wrong_request_is_code_2_without_a_traceback(words, capsys):
    code, out, err = run(*words, capsys=capsys)
    assert code == 2
    assert "usage: fedicom" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    "words", [["--help"], ["recipe", "--help"], ["recipe", "show", "--help"], ["predict", "--help"],
              ["audit", "verify", "--help"], ["simulate", "--help"], ["hospitals", "--help"], ["version", "--help"]]
)  # fmt: skip
def test_every_verb_explains_itself(words, capsys):
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0
    assert "usage: fedicom" in out


def test_version_is_that_of_the_distribution(capsys):
    code, out, _ = run("version", capsys=capsys)
    assert (code, out) == (0, "fedicom 0.1.0\n")


def test_an_interrupt_ends_with_130_and_a_word(capsys, monkeypatch):
    def stopped(words):
        raise KeyboardInterrupt

    monkeypatch.setattr("common.cli.version_verb", stopped)
    code, _, err = run("version", capsys=capsys)
    assert (code, err) == (130, "fedicom: stopped by you\n")


@pytest.mark.parametrize("words", [["--help"], ["recipe", "--help"]])
def test_help_loads_no_library_that_it_does_not_need(words):
    heavy = ("torch", "hydra", "omegaconf", "pydantic", "flwr", "monai", "timm", "pydicom", "numpy", "rich")
    code = (
        "import sys, fedicom\n"
        f"try: fedicom.main({words!r})\n"
        "except SystemExit: pass\n"
        f"print('loaded', sorted(set({heavy!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded []"


def loaded_by(code: str) -> list[str]:
    """Heavy packages that a process holds after this code."""
    heavy = ("torch", "flwr", "monai", "timm", "sklearn", "scipy", "matplotlib", "onnx", "highdicom")
    code = f"import sys, fedicom\n{code}\nprint('loaded', *sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()[1:]


def test_the_help_of_no_verb_loads_torch_or_its_like():
    every = "".join(f"try: fedicom.main([{verb!r}, '--help'])\nexcept SystemExit: pass\n" for verb in fedicom._VERBS)
    assert set(loaded_by(every)) <= {"scipy"}  # with which `rehearse` draws its phantoms


def test_the_simulation_starts_without_what_only_some_runs_need():
    # MONAI alone takes two seconds; prepared samples and a network of timm need none of it
    assert set(loaded_by("import simulations.run")) <= {"torch", "flwr", "scipy", "highdicom", "onnx"}


def logs(folder: Path) -> Signer:
    key = Signer.temporary()
    server, site = AuditLog(folder / "server.jsonl", key), AuditLog(folder / "north.jsonl", key)
    site.append("plan received", server_head=server.head)
    server.append("round aggregated", heads={"north": site.head})
    return key


def test_audit_verify_checks_a_log_alone_and_against_the_other_side(tmp_path, capsys):
    key = logs(tmp_path)
    code, out, _ = run(
        "audit", "verify", str(tmp_path / "north.jsonl"), "--key", key.public, "--against",
        str(tmp_path / "server.jsonl"), capsys=capsys,
    )  # fmt: skip
    assert code == 0
    assert "2 events, chain and signatures hold" in out
    assert "server.jsonl remembers 1 head of" in out
    code, out, _ = run(
        "audit", "verify", str(tmp_path / "server.jsonl"), "--against", str(tmp_path / "north.jsonl"), capsys=capsys
    )
    assert code == 0
    assert "give --key" in out


def test_audit_verify_of_a_changed_or_cut_log_is_code_1_and_one_line(tmp_path, capsys):
    key = logs(tmp_path)
    path = tmp_path / "north.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(rows[0])
    code, out, err = run("audit", "verify", str(path), "--against", str(tmp_path / "server.jsonl"), capsys=capsys)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    path.write_bytes(rows[0] + rows[1].replace(b"plan", b"plot"))
    code, out, err = run("audit", "verify", str(path), "--key", key.public, capsys=capsys)
    assert (code, out) == (1, "")
    assert "event 1: content does not match its hash" in err


def test_audit_verify_of_no_file_is_code_2_and_shows_what_was_typed(tmp_path, capsys):
    code, out, err = run("audit", "verify", str(tmp_path / "none.jsonl"), capsys=capsys)
    assert (code, out) == (2, "")
    assert err == f"fedicom: {tmp_path / 'none.jsonl'}: there is no such file or folder; check the path\n"


@pytest.mark.parametrize("words", [["{folder}"], ["{folder}/north.jsonl", "--against", "{folder}"]])
def test_audit_verify_of_a_folder_names_the_logs_in_it(tmp_path, words, capsys):
    logs(tmp_path)
    code, out, err = run("audit", "verify", *(word.format(folder=tmp_path) for word in words), capsys=capsys)
    assert (code, out) == (2, "")
    found = f"{tmp_path / 'north.jsonl'}, {tmp_path / 'server.jsonl'}"
    assert err == f"fedicom: {tmp_path} is a folder, expected one log; in it: {found}\n"


def test_a_reader_that_stops_reading_gets_no_traceback():
    command = f"{sys.executable} -m fedicom recipe show | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "name: phantom_2d\n"
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_output_to_a_full_disk_is_one_line_and_code_1():
    command = f"{sys.executable} -m fedicom provision --example > /dev/full"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("fedicom: No space left on device; free space on the disk")
    assert done.stderr.count("\n") == 1


def test_without_an_output_at_all_the_work_is_done():
    command = f"{sys.executable} -m fedicom provision --example >&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_too_few_files_that_may_be_open_are_told_with_what_to_do(monkeypatch, capsys):
    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data/DOE^JANE")

    monkeypatch.setattr(imports, "call", fail)
    monkeypatch.setattr(fedicom, "_write_no_more", lambda: None)
    code, _, err = run("recipe", "show", capsys=capsys)
    assert code == 1
    assert "let this process have more files open (`ulimit -n`)" in err
    assert "DOE" not in err


def test_python_does_not_search_torch_for_rubbish_at_its_end():
    check = (
        "import atexit, gc, fedicom; atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0)); "
        "fedicom.main(['version'])"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "frozen True"


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["--rounds", "2"], "rounds=2"),
        (["--rounds=2", "seed=1"], "rounds=2"),
        (["seed=1", "--privacy.epsilon", "3"], "privacy.epsilon=3"),
        (["--resume"], "resume=VALUE"),
    ],
)
@pytest.mark.parametrize("verb", [["simulate"], ["recipe", "show"]])
def test_settings_with_dashes_are_answered_with_how_they_are_written(verb, words, instead, capsys):
    with pytest.raises(SystemExit) as ended:
        fedicom.main([*verb, *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"settings are written without dashes: {instead}\n")


def test_the_help_of_simulate_says_where_all_fields_are_and_how_to_go_on(capsys):
    with pytest.raises(SystemExit):
        fedicom.main(["simulate", "--help"])
    told = capsys.readouterr().out
    for word in ("docs/configuration.md", "fedicom recipe show", "out=DIR", "resume=true", "overwrite=true"):
        assert word in told


@pytest.mark.parametrize(
    ("verb", "defaults"),
    [
        (["hospitals", "import"], ["5", "dirichlet", "0.5", "20", "0", "id", "label", "0.2"]),
        (["hospitals", "phantom"], ["2", "4", "120", "160", "64", "0"]),
        (["predict"], ["predictions.csv"]),
        (["rehearse"], ["runs/federation", "3", "5"]),
        (["privacy", "attack"], ["12", "800", "2", "400", "0", "runs/attacks"]),
    ],
)
def test_help_shows_the_defaults_that_decide_the_result(verb, defaults, capsys):
    with pytest.raises(SystemExit):
        fedicom.main([*verb, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in defaults:
        assert f"(default: {default})" in told


def test_a_folder_that_may_not_be_read_is_a_sentence_without_its_path(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*given: object) -> None:
        raise PermissionError(13, "Permission denied", "/data/Roe_Jane")

    monkeypatch.setattr(imports, "call", refuse)
    code, out, err = run("version", capsys=capsys)
    assert (code, out) == (1, "")
    assert err.startswith("fedicom: Permission denied; check the owner and mode")
    assert "Roe" not in err
