"""What may be configured, and how wrong settings are refused."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedicom
from common.composition import config_root, groups
from common.config import (
    Evaluation,
    Federation,
    ModelConfig,
    Preprocessing,
    Privacy,
    Recipe,
    Settings,
    Task,
    Training,
    as_plain,
    load_recipe,
    load_settings,
    recipe_from_json,
    settings_from_json,
)
from common.errors import ConfigError

GOLDEN = Recipe(
    name="golden",
    seed=7,
    rounds=3,
    task=Task(classes=("healthy", "ill")),
    data=Preprocessing(size=(32, 32)),
    model=ModelConfig(name="resnet18"),
    privacy=Privacy(mechanism="dp_sgd", epsilon=8, delta=1e-5),
)
GOLDEN_ID = "93fdf1179736356bb21b70348d36e860d1493a4d5591cd75b12b442579947b77"
"""Changes when a field is added, renamed or gets another default: every site has to approve its recipes again."""


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # unknown names
        (["roundss=3"], ["roundss: no such field", "Did you mean rounds?"]),
        (["privacy.epsilonn=3"], ["privacy.epsilonn: no such field", "Did you mean epsilon?", "noise_multiplier"]),
        (["federation.early_stopping.patience=1"], ["patience: no such field", "patience_rounds"]),
        (["simulation.worker=2"], ["simulation.worker: no such field", "workers"]),
        (["recipe=pneumonia"], ["recipe", '"pneumonia"', "phantom_2d"]),
        (["model=resnet81"], ["model", '"resnet81"', "resnet18"]),
        (["model=null"], ["model", "null", "resnet18"]),
        (["hydra.run.dir=x"], ["hydra.run.dir"]),
        # wrong types
        (["rounds=true"], ["rounds: got true", "integer"]),
        (["rounds='3'"], ['rounds: got "3"', "integer"]),
        (["rounds=2.5"], ["rounds: got 2.5", "integer"]),
        (["training.lr=fast"], ['training.lr: got "fast"', "number"]),
        (["resume=1"], ["resume: got 1; ", "boolean, or input should be 'conclude'"]),
        (["baselines=all"], ['baselines: got "all"; ', "boolean, or input should be 'centralised'"]),
        (["name=3"], ["name: got 3", "string"]),
        (["data.size=28"], ["data.size: got 28", "array"]),
        (["federation.timeout_s=null"], ["federation.timeout_s: got null", "number"]),
        (["task=null"], ["task: got null"]),
        # after all rounds the baselines, which make their passes in one, ended in a traceback
        (
            ["baselines=true", "rounds=3", "training.local_epochs=4000"],
            ["rounds x training.local_epochs is 12000", "at most 10,000", "baselines=false"],
        ),
        # outside the range
        (["rounds=0"], ["rounds: got 0", "greater than or equal to 1"]),
        (["seed=-1"], ["seed: got -1", "greater than or equal to 0"]),
        (["rounds=99999999999999999999"], ["rounds: got 99999999999999999999", "100000"]),
        (["training.lr=nan"], ["training.lr: got NaN", "finite"]),
        (["training.lr=1e400"], ["training.lr: got Infinity", "finite"]),
        (["privacy.delta=0.5"], ["privacy.delta: got 0.5", "less than 0.01"]),
        (["training.optimizer=adam"], ['training.optimizer: got "adam"', "'adamw' or 'sgd'"]),
        (["federation.strategy=fedsgd"], ['federation.strategy: got "fedsgd"', "'fedavg'", "'bulyan'"]),
        (["data.size=[28,4]"], ["data.size.1: got 4", "greater than or equal to 8"]),
        (["data.size=[28,28,28,28]"], ["data.size: got [28, 28, 28, 28]", "at most 3"]),
        (["name=../elsewhere"], ['name: got "../elsewhere"', "pattern"]),
        (["name=/etc"], ["name", "pattern"]),
        (["task.classes=['',a]"], ["task.classes.0", "pattern"]),
        (["model.weights_file=w", "model.weights_sha256=abc"], ['model.weights_sha256: got "abc"', "[0-9a-f]{64}"]),
        # a union says all that it would take, in one line
        (["training.class_weights=heavy"], ['training.class_weights: got "heavy"', "array, or", "'balanced'"]),
        (["training.class_weights=[1,-1]"], ["training.class_weights.1: got -1", "greater than 0"]),
        # impossible together
        (["model=resnet18_3d"], ["model.dimensions is 3", "task.dimensions is 2"]),
        (["model=resnet18", "model.dimensions=3"], ["timm", "2D", "family=monai"]),
        (["data.size=[8,8,8]"], ["data.size has 3 axes", "task.dimensions is 2"]),
        (["data.spacing_mm=[1,1,1]"], ["spacing_mm has 3", "size has 2"]),
        (["data.low=60", "data.high=50"], ["low must be below high", "60", "50"]),
        (["data.high=200"], ["percentiles", "200"]),
        (["task.classes=[a,b,c]"], ["task", "exactly 2 classes, got 3"]),
        (["task.classes=[a,a]"], ["task", "differ"]),
        (["data.augmentation.flip_left_right=true"], ["flip_left_right", "laterality_sensitive"]),
        (
            ["data.augmentation.flip_up_down=true", "data.augmentation.rotate_deg=180"],
            ["flip_up_down", "rotate_deg 180", "left-right", "laterality_sensitive"],
        ),
        (
            [
                "recipe=phantom_3d",
                "task.laterality_sensitive=false",
                "data.augmentation.flip_left_right=true",
                "data.orientation=source",
            ],
            ["flip_left_right needs data.orientation=LPS or RAS", "got source"],
        ),
        (["privacy.delta=null"], ["privacy", "needs delta"]),
        (["privacy.noise_multiplier=1.0"], ["privacy", "exactly one of epsilon and noise_multiplier"]),
        (["privacy.epsilon=null"], ["privacy", "exactly one of epsilon and noise_multiplier"]),
        (["privacy.mechanism=none"], ["privacy", "mechanism is none"]),
        (["training.class_weights=balanced"], ["training.class_weights=balanced", "private counts"]),
        (["training.class_weights=[1,2,3]"], ["training.class_weights has 3", "2 classes"]),
        (["model.norm=batch"], ["model.norm=batch", "group"]),
        (["federation.site_weights=patients"], ["federation.site_weights", "equal"]),
        (["federation.early_stopping.patience_rounds=2"], ["patience_rounds is 2", "under privacy use 0"]),
        (
            ["privacy=none", "federation.early_stopping.patience_rounds=2", "evaluation.validation_fraction=0"],
            ["patience_rounds is 2", "validation_fraction is 0"],
        ),
        (
            ["privacy=none", "federation.early_stopping.patience_rounds=2", "federation.ema_decay=0.9"],
            ["ema_decay is 0.9", "set the other to 0"],
        ),
        (
            ["privacy=none", "federation.early_stopping.patience_rounds=2", "simulation.metrics=noised"],
            ["patience_rounds is 2", "simulation.metrics=noised", "nothing to watch"],
        ),
        (["federation.quorum=9"], ["federation", "quorum 9", "sites 4"]),
        (["federation.sites=1"], ["federation", "quorum 2", "sites 1"]),
        (["federation.strategy=krum"], ["federation", "quorum of at least 3, got 2"]),
        (
            ["federation.sites=9", "federation.quorum=6", "federation.strategy=bulyan", "federation.malicious_sites=1"],
            ["quorum of at least 7, got 6"],
        ),
        (["federation.strategy=fedtrimmedavg", "federation.quorum=4"], ["trim_fraction 0.2 cuts nobody from 4"]),
        (["federation.strategy=fedprox"], ["proximal_mu"]),
        (
            ["privacy.secure_aggregation=true", "federation.compression=int8"],
            ["federation.compression=int8 rounds single updates", "say federation.compression=none"],
        ),
        (["privacy.secure_aggregation=true", "federation.sites=2"], ["federation.sites is 2", "3 to 1000"]),
        (
            ["privacy.secure_aggregation=true", "federation.strategy=krum", "federation.quorum=3"],
            ["federation.strategy=krum", "fedavg"],
        ),
        (["privacy.secure_aggregation=true"], ["federation.quorum is 2", "4 sites", "at least 3"]),
        (
            ["privacy.secure_aggregation=true", "federation.quorum=3"],
            ["federation.max_update_norm is 10000", "1.9e-05", "at most 511"],
        ),
        (
            [
                "privacy.secure_aggregation=true",
                "federation.quorum=3",
                "federation.site_weights=patients",
                "privacy.mechanism=none",
                "privacy.epsilon=null",
            ],
            ["federation.max_patients"],
        ),
        (["model.weights_file=w.safetensors"], ["model", "weights_sha256"]),
        (["model.trainable=head"], ["model", "weights_file"]),
        # not name=value
        (["rounds"], ["'rounds'", "name=value"]),
        (["task.classes=[Entzündung,normal]"], ["cannot read", "stands in quotes"]),
        (["rounds=1,2"], ["rounds", "several values", "[1,2]"]),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) and "=" in str(part) else "",
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_field_value_and_what_is_allowed(overrides, words):
    message = refusal(*overrides)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_every_wrong_field_has_a_line_of_its_own():
    lines = refusal("rounds=0", "training.lr=-1").splitlines()
    assert [line.split(":")[0] for line in lines] == ["rounds", "training.lr"]


def test_the_whole_of_a_long_value_is_not_repeated():
    assert len(refusal(f"rounds={'x' * 5000}")) < 200


@pytest.mark.parametrize(
    "words", [["simulate", "roundss=3"], ["simulate", "rounds=true"], ["recipe", "show", "model=resnet18_3d"]]
)
def test_the_command_line_answers_a_wrong_setting_with_code_2_and_one_line(words, capsys):
    assert fedicom.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fedicom: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("recipe", groups()["recipe"])
def test_every_shipped_recipe_composes_and_is_named_as_its_file(recipe):
    assert load_recipe([f"recipe={recipe}"]).name == recipe


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group, options in groups().items() if group != "recipe" for option in options],
)
def test_every_option_of_every_group_composes(group, option):
    overrides = [f"{group}={option}"]
    if group == "model" and load_model_dimensions(option) == 3:
        overrides += ["task.dimensions=3", "data.size=[32,32,32]"]
    settings = load_settings(overrides)
    chosen = as_plain(settings)["simulation"] if group == "simulation" else as_plain(settings.recipe)[group]
    for line in (config_root() / group / f"{option}.yaml").read_text().splitlines():
        name, _, value = line.partition(": ")
        if value and not line.startswith((" ", "#", "defaults")):
            assert json.dumps(chosen[name]).strip('"').lower() in (value.lower(), str(_number(value)))


def load_model_dimensions(option: str) -> int:
    text = (config_root() / "model" / f"{option}.yaml").read_text()
    return 3 if "dimensions: 3" in text else 2


def _number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return "null" if text == "null" else text


def test_a_description_does_not_outlive_the_classes_that_it_tells_of():
    """A model of pneumonia was presented, in report, model card and audit, as one that finds nodules in phantoms."""
    assert "phantoms" in load_recipe([]).description
    assert load_recipe(["task.classes=[normal,pneumonia]"]).description == ""
    own = ["task.classes=[normal,pneumonia]", "description=Tells pneumonia from normal"]
    assert load_recipe(own).description == "Tells pneumonia from normal"


@pytest.mark.parametrize("name", groups()["recipe"])
def test_a_shipped_description_says_nothing_that_another_setting_would_make_untrue(name):
    description = load_recipe([f"recipe={name}"]).description
    assert description
    assert not re.search(r"privacy|pixels|voxels", description)


def test_the_id_of_a_fixed_recipe_is_known():
    assert GOLDEN.id == GOLDEN_ID


def test_the_id_is_the_sha256_of_sorted_compact_json():
    again = json.dumps(as_plain(GOLDEN), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert GOLDEN.id == hashlib.sha256(again).hexdigest()


def test_an_integer_and_its_float_give_the_same_id():
    assert load_recipe(["training.lr=1"]).id == load_recipe(["training.lr=1.0"]).id


def test_the_run_folder_does_not_change_the_id():
    assert load_settings(["out=/somewhere", "simulation.workers=2"]).recipe.id == load_recipe().id


RECIPES = st.builds(
    Recipe,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9 _.-]{0,79}", fullmatch=True),
    description=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    seed=st.integers(0, 2**31 - 1),
    rounds=st.integers(1, 1000),
    training=st.builds(
        Training,
        lr=st.floats(1e-9, 10),
        weight_decay=st.floats(0, 1),
        class_weights=st.one_of(st.none(), st.just("balanced"), st.tuples(st.floats(0.1, 9), st.floats(0.1, 9))),
    ),
    federation=st.builds(Federation, sites=st.integers(2, 50), timeout_s=st.floats(1, 1e9)),
    evaluation=st.builds(Evaluation, bootstraps=st.integers(100, 10_000)),
)


@given(RECIPES)
@settings(max_examples=25, deadline=None)
def test_canonical_json_reads_back_as_the_same_recipe(recipe):
    again = recipe_from_json(recipe.canonical)
    assert again == recipe
    assert again.id == recipe.id


@given(RECIPES, st.integers(1, 1000))
@settings(max_examples=15, deadline=None)
def test_another_value_gives_another_id(recipe, rounds):
    assert (replace(recipe, rounds=rounds).id == recipe.id) == (rounds == recipe.rounds)


@pytest.mark.parametrize("text", [b"\xff\xfe", "", "{", "[]", "null", '{"name": "\\ud800"}', "{" * 10_000])
def test_junk_is_no_recipe_and_is_not_quoted(text):
    with pytest.raises(ConfigError) as caught:
        recipe_from_json(text)
    assert len(str(caught.value)) < 200


def test_settings_cross_to_another_process_as_text():
    made = load_settings(["out=x", "simulation.workers=3"])
    again = settings_from_json(json.dumps(as_plain(made)))
    assert isinstance(again, Settings)
    assert again == made


@pytest.mark.parametrize(
    "override",
    [
        "training.batch_size=1000001", "training.local_epochs=1e308", "privacy.epsilon=1e-300", "privacy.epsilon=1e300",
        "privacy.delta=1e-300",
    ],
)  # fmt: skip
def test_numbers_that_overflow_the_account_are_refused_by_name(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_recipe(["privacy=dp_sgd", override])
