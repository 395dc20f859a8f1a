"""Recipes as they travel: the canonical text, signed by the coordinator."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from common.config import Recipe, as_plain, recipe_from_json
from common.errors import ConfigError
from common.identity import Signer, signed_by
from common.storage import storing, write_whole

FORMAT = "fedicom recipe 1"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class SignedRecipe:
    """A recipe and the coordinator's signature under its id; made by `sign_recipe` or `parse_recipe` alone."""

    recipe: Recipe
    coordinator: str
    """Public key of the signer, 64 hexadecimal digits."""
    signature: str

    @property
    def text(self) -> str:
        """What the file holds: JSON, one field a line."""
        plain = {
            "format": FORMAT,
            "id": self.recipe.id,
            "coordinator": self.coordinator,
            "signature": self.signature,
            "recipe": as_plain(self.recipe),
        }
        return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        """Writes the file whole.

        Raises:
            StorageError: The disk is full or the folder cannot be written.
        """
        write_whole(path, self.text.encode())


def sign_recipe(recipe: Recipe, signer: Signer) -> SignedRecipe:
    """Puts the coordinator's name to a recipe."""
    return SignedRecipe(recipe, signer.public, signer.sign(_signed_bytes(recipe)))


def read_recipe(path: Path, coordinator: str | None) -> SignedRecipe:
    """Reads a signed recipe from a file.

    Raises:
        ConfigError: As `parse_recipe`.
        StorageError: The file cannot be read.
    """
    with storing(path.name):
        size = path.stat().st_size
        data = path.read_bytes() if size <= _MAX_BYTES else b""
    if not data:
        raise ConfigError(f"{path.name} has {size} bytes; expected a signed recipe of at most {_MAX_BYTES}")
    return parse_recipe(data, coordinator)


def parse_recipe(data: bytes | str, coordinator: str | None) -> SignedRecipe:
    """A signed recipe, after checking format, every field, the id and the signature.

    Args:
        coordinator: The key that must have signed it; None accepts the key that the file names, for the signer's own
            tools only.

    Raises:
        ConfigError: Something does not hold; says what.
    """
    try:
        plain = json.loads(data)
        form, named, key, signature, body = (
            plain[name] for name in ("format", "id", "coordinator", "signature", "recipe")
        )
        text = json.dumps(body)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            "this is no signed recipe; ask the coordinator for the file of `fedicom recipe sign`"
        ) from None
    if form != FORMAT or len(plain) != 5:
        raise ConfigError(f"signed recipe of another format, expected {FORMAT!r}; update the older side")
    recipe = recipe_from_json(text)
    if recipe.id != named:
        raise ConfigError(
            f"the recipe's content has id {recipe.id[:12]}, the file says {_shown(named)}: it was changed, or made by "
            "another version of Fedicom"
        )
    if coordinator is not None and key != coordinator:
        raise ConfigError(
            f"the recipe is signed by key {_shown(key)}, this installation trusts coordinator {coordinator[:12]}; "
            "ask the coordinator for a recipe under its current key"
        )
    if not (isinstance(key, str) and isinstance(signature, str) and signed_by(key, _signed_bytes(recipe), signature)):
        raise ConfigError("the signature under the recipe does not hold; ask the coordinator for the file again")
    return SignedRecipe(recipe, key, signature)


def _shown(text: object) -> str:
    # ascii: the words of a file that was tampered with must not move the cursor of a terminal
    return ascii(str(text)[:12])[1:-1]


def _signed_bytes(recipe: Recipe) -> bytes:
    # The name of the purpose comes first: a signature under something else can never pass for one under a recipe.
    return f"{FORMAT}\n".encode() + recipe.canonical
