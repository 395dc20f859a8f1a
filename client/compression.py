"""What rounding leaves out of an update stays at the site and goes into its next one: error feedback.

Seide et al. 2014; Karimireddy et al. 2019 ("Error feedback fixes SignSGD"). With d the change that training made and r
what is left over from before, Q(d + r) leaves and d + r - Q(d + r) is kept: whatever is lost in one round comes later,
so over all rounds a site sends the sum of its changes but for the last remainder.

Under differential privacy d is noised before it comes here. What leaves and what is kept follow from noised changes
alone (post-processing), so neither costs epsilon.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.compression import Form, quantised, rounds
from common.errors import ExchangeError
from common.exchange import RoundPlan
from common.storage import Flush, private_folder, storing, to_disk, write_whole
from common.weights import Array, Weights, room, safetensors

log = logging.getLogger(__name__)

_NAME = re.compile(r"[0-9a-f]{16}-(\d{6,7})\.safetensors")


class Remainders:
    """What was left over, a file a round; the folder is patient data as long as updates are not noised.

    A round takes what a round before it left, never its own: trained once more after a crash, it gives the same bits.
    So the file that the newest was made from stays beside it.
    """

    def __init__(self, folder: Path, form: Form, flush: Flush = to_disk) -> None:
        """Names the folder; it is made when something is left over."""
        self._folder, self._form, self._flush = folder, form, flush

    def rounded(self, plan: RoundPlan, delta: Weights) -> Weights:
        """What leaves for this change; the rest is kept when this returns. `delta` itself without compression.

        Raises:
            ExchangeError: A number is NaN or infinite.
            StorageError: The rest cannot be kept.
        """
        if self._form == "none":
            return delta
        before = self._before(plan)
        whole = delta if before is None else _plus(delta, before[1])
        sent = quantised(whole, self._form)
        left = {name: array - sent[name] for name, array in whole.items() if rounds(array.shape)}
        path = private_folder(self._folder) / f"{plan.recipe_id[:16]}-{plan.round:06d}.safetensors"
        write_whole(path, safetensors(left), self._flush)
        self._remove(plan.recipe_id, {path} if before is None else {path, before[0]})
        return sent

    def forget(self, recipe_id: str) -> None:
        """Removes what a recipe left, which trains no more.

        Raises:
            StorageError: A file cannot be removed.
        """
        self._remove(recipe_id, set())

    def _remove(self, recipe_id: str, but: set[Path]) -> None:
        with storing("what rounding left out"):
            for path in self._folder.glob(f"{recipe_id[:16]}-*.safetensors"):
                if path not in but:
                    path.unlink()

    def _before(self, plan: RoundPlan) -> tuple[Path, dict[str, Array]] | None:
        """What the newest round before this one left, and where."""
        files = self._folder.glob(f"{plan.recipe_id[:16]}-*.safetensors")
        found = ((int(name[1]), path) for path in files if (name := _NAME.fullmatch(path.name)))
        for round_, path in sorted(found, reverse=True):
            if round_ < plan.round:
                with storing("what rounding left out"), suppress(SafetensorError):
                    left = load_file(path)
                    if all(array.dtype == np.float32 for array in left.values()):
                        return path, left
                log.warning("what rounding left out of round %d cannot be read any more", round_)
                return None
        return None


def _plus(delta: Weights, left: Mapping[str, Array]) -> Weights:
    """The sum where something was left; vectors have no remainder."""
    if any(array.shape != delta.shapes.get(name) for name, array in left.items()):
        raise ExchangeError("what rounding left out of an earlier round is of another network; remove state/remainders")
    whole, sums = room(delta.shapes)
    whole[...] = delta.whole
    for name, array in left.items():
        sums[name] += array
    return Weights.filled(whole, sums)
