"""YAML files and overrides become plain types, by Hydra; `common.config` checks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.wrong_fields import shown


def groups() -> dict[str, tuple[str, ...]]:
    """Names of the files one may choose in each folder of `configs/`, for example `model=resnet18`."""
    root = config_root()
    return {
        folder.name: tuple(sorted(file.stem for file in folder.glob("*.yaml")))
        for folder in sorted(root.iterdir())
        if folder.name != "site" and any(folder.glob("*.yaml"))  # a site's policy is no part of a recipe
    }


def config_root() -> Path:
    """Folder of the packaged YAML files."""
    import configs

    return Path(configs.__file__).parent


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """`configs/fedicom.yaml` with the overrides, as plain types.

    Raises:
        ConfigError: An override cannot be read, or chooses a file that is not there.
    """
    # Imported here: Hydra takes 0.2 s, and `fedicom --help` needs none of it.
    from hydra import compose as composed_by_hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    choices = groups()
    words, keys = [], set()
    for word in overrides:
        try:
            override = OverridesParser.create().parse_override(word)
        except HydraException:
            raise ConfigError(
                f"cannot read {word!r}: expected name=value, for example rounds=10; a text with other signs than a-z, "
                """digits and _-./ stands in quotes inside the shell's, as 'description="chest (2 mm)"'"""
            ) from None
        key = override.key_or_group
        keys.add(key)
        if key.partition(".")[0] == "hydra":
            raise ConfigError(f"{key}: Hydra's own settings are fixed; expected a field of the recipe or of the run")
        if override.is_sweep_override():
            raise ConfigError(f"{key}: got several values; expected one, a list is written {key}=[1,2]")
        if key in choices and not override.is_delete():
            chosen = override.value()
            if chosen not in choices[key]:
                raise ConfigError(
                    f"{key}: got {shown(chosen)}; expected one of {', '.join(choices[key])} "
                    f"(single fields are set as {key}.name=value)"
                )
            words.append(word)
        else:
            # `++` lets every key through to pydantic, whose answer names the field and what is allowed.
            words.append(word if word.startswith(("+", "~")) else f"++{word}")
    if "task.classes" in keys and "description" not in keys:
        words.append("++description=''")  # the file's own tells of other classes, and stands in report and model card
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_root()), version_base="1.3"):
            composed = OmegaConf.to_container(composed_by_hydra("fedicom", overrides=words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot compose the configuration: {str(error).splitlines()[0]}") from None
    finally:
        GlobalHydra.instance().clear()
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}
