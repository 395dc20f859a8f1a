"""Pages of `fedicom privacy`: one HTML file each, without network and script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from common.epsilon import rounded_down, rounded_up
from common.html import Child, Html, document, items, join, moment, pairs, table, tag
from common.storage import write_whole

if TYPE_CHECKING:
    from common.privacy_audit import PrivacyAudit
    from simulations.attacks.study import Gallery, Row


def _page(title: str, eyebrow: str, lead: Child, meta: str, *sections: tuple[str, Html]) -> str:
    top = (
        tag("p", eyebrow, class_="eyebrow"),
        tag("h1", title),
        tag("p", meta, class_="meta"),
        tag("p", lead, class_="lead"),
    )
    return document(title, top, (("", *section) for section in sections), "Written by Fedicom.", images=True)


def write_audit_page(found: PrivacyAudit, path: Path) -> None:
    """Raises StorageError when the file cannot be written."""
    write_whole(path, _audit(found).encode())


def _audit(found: PrivacyAudit) -> str:
    verdict = (
        "The mechanism passed every test."
        if found.passed
        else f"The mechanism FAILED: {', '.join(found.failed)}. Do not train or release with it."
    )
    bound = found.bound
    if bound is not None:
        verdict += (
            f" An attacker who sees every released gradient proved an epsilon of at least {rounded_down(bound.lower)}; "
            f"the account allows {rounded_up(bound.upper)}."
        )
    rows: list[list[Child]] = [
        [check.name, "passed" if check.passed else tag("strong", "FAILED"), check.found, check.expected,
         f"{check.false_alarm:.0e}" if check.false_alarm else "exact"]
        for check in found.checks
    ]  # fmt: skip
    sections: list[tuple[str, Html]] = [
        (
            "Self-tests",
            table(
                ("Check", "Result", "Found", "Expected", "False alarm"), rows, numbers_from=9,
                caption="The functions that train here, asked with made-up images; chance of failing without a fault",
            ),
        )
    ]  # fmt: skip
    if bound is not None:
        cells: list[tuple[Child, Child]] = [
            ("Epsilon at least", f"{bound.lower:.3f} with {100 * bound.confidence:g} % confidence"),
            ("Epsilon at most", f"{bound.upper:.3f} at delta {bound.delta:g}, by PLD, of the same {bound.steps} steps"),
            ("Guesses", f"{bound.right} of {bound.guesses} right, about {bound.canaries} canaries"),
        ]
        text = (
            "Canaries are made-up patients who are in the training, or not, by the toss of a coin. Who sees every "
            "gradient guesses the coins; so many right guesses are impossible below some epsilon. A bound far below "
            "the account is no proof that the account is loose: one training sees only so much."
        )
        sections.append(("One-run audit", join(tag("p", text), pairs(*cells))))
    what = (
        ("Recipe", tag("span", found.recipe_id, class_="hash")),
        ("Model", tag("span", found.weights, class_="hash") if found.weights else "none: a recipe was audited"),
        ("Training patients", ", ".join(f"{name} {count:,}" for name, count in found.patients.items())),
        *((f"Code of {name}", tag("span", value, class_="hash")) for name, value in sorted(found.code.items())),
    )
    sections.append(("What was audited", pairs(*what)))
    limits = items(
        "That patients resemble each other, or that one person is a patient of several sites.",
        "Scores and counts, which a site sends without noise unless its policy says otherwise.",
        "Code that is installed elsewhere: every site tests its own.",
    )
    sections.append(("What this cannot find", limits))
    return _page(
        f"Privacy audit: {found.recipe}", "Fedicom privacy audit", verdict, f"{moment(found.made)} · on {found.device}",
        *sections,
    )  # fmt: skip


def write_attack_page(
    name: str, rows: Sequence[Row], galleries: Sequence[Gallery], facts: Mapping[str, Any], path: Path
) -> None:
    """Raises StorageError when the file cannot be written."""
    write_whole(path, _attacks(name, rows, galleries, facts).encode())


def _attacks(
    name: str, rows: Sequence[Row], galleries: Sequence[Gallery], facts: Mapping[str, Any]
) -> str:  # fmt: skip
    sections = []
    if rows:
        cells: list[list[Child]] = []
        for row in rows:
            for what, attacks in row.attacks:
                shown = [cell for one in attacks for cell in (one.area, one.rate)]
                cells.append([*row.named, what, *shown])
        tpr = "found at 0.1 % false"
        head = ("Epsilon", "Test AUROC", "Attacked", "LiRA, AUC", tpr, "Loss threshold, AUC", tpr)
        text = (
            f"{facts['models']} federations of {facts['sites']} sites, each trained on a random half of "
            f"{facts['patients']} patients; every one is attacked with the others as shadow models. An AUC of 0.5 and "
            "0.10 % found are guessing; ± is the standard deviation over federations, in brackets are 95 % intervals."
        )
        few = min(row.attacked.update.negatives for row in rows)
        text += f" The fewest decisions about non-members behind a cell are {few:,}; 1,000 are needed to see 0.1 %."
        sections.append(("Was a patient in the training?", join(
            tag("p", text), table(head, cells, caption="Success of membership inference, and utility, against epsilon")
        )))  # fmt: skip
    if galleries:
        sections.append(("What does the picture look like?", _rebuilt(galleries)))
    lead = "What an attacker gets out of a federation, with and without its defences."
    meta = f"Images: {name} · seed {facts['seed']}"
    return _page(f"Attacks: {name}", "Fedicom privacy attacks", lead, meta, *sections)


def _rebuilt(galleries: Sequence[Gallery]) -> Html:
    blocks: list[Child] = [
        tag("p", "Rebuilt from one update of one picture with a small smooth network at its random start, label known: "
            "the easiest case. With secure aggregation the coordinator has one site's update under masks, and the sum "
            "of five sites' updates, of which the best of five rebuilt pictures is shown. Privacy clips and noises the "
            "update with the recipe's own engine. SSIM 1 is the same picture, 0 nothing of it.")
    ]  # fmt: skip
    for gallery in galleries:
        lines = [[defence, *gallery.likeness(n)] for n, defence in enumerate(gallery.defences)]
        count = len(gallery.rows)
        told = f"{gallery.images}: mean over {count} pictures, ± standard deviation" if count > 1 else gallery.images
        blocks.append(tag("h3", gallery.images))
        for tried in gallery.rows[:_SHOWN]:
            shown = [_picture(tried[0].truth, "the patient's picture", "")]
            shown += [
                _picture(one.image, one.defence, f"PSNR {one.psnr_db:.1f} dB, SSIM {round(one.ssim, 2) + 0.0:.2f}")
                for one in tried
            ]
            blocks.append(tag("div", *shown, style=_GALLERY))
        blocks.append(table(("Defence", "PSNR, dB", "SSIM"), lines, caption=told))
    return join(*blocks)


_SHOWN = 3
"""Pictures of each kind; all of them are in the table."""
_GALLERY = "display:grid;grid-template-columns:repeat(auto-fit,minmax(104px,1fr));gap:10px;margin:18px 0"


def _picture(image: npt.NDArray[np.float32], name: str, says: str) -> Html:
    from PIL import Image

    out = BytesIO()
    Image.fromarray(np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)).save(out, format="PNG")
    source = f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"
    return tag(
        "figure",
        tag("img", src=source, alt=name, style="width:100%;image-rendering:pixelated;border-radius:4px"),
        tag("figcaption", name, *((tag("br"), says) if says else ())),
    )
