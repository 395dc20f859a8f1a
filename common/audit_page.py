"""The audit report as one HTML page: the verdict first, then who trained what, on whose word, and what left."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.audit_report import Account, Line, LogLine, Sent, SiteLine, Story
from common.epsilon import rounded_up
from common.html import Child, Html, card, document, items, join, moment, pairs, table, tag
from common.lineage import Approval, Lineage, counted
from common.printable import number_of

_OPEN_ROWS = 24
"""A longer table of what left is folded: its sums stand in the table of sites."""
_MOST_BOXES = 10

_CSS = """
.verdict{margin:22px 0 0;padding:14px 20px;border-radius:8px;border-left:6px solid var(--tone);
background:color-mix(in srgb,var(--tone) 11%,var(--card))}
.verdict h2{margin:0;font-size:20px}
.verdict ul{margin:.4em 0 0;padding-left:1.2em}
.ok{--tone:var(--c2)}.part{--tone:var(--edge)}.bad{--tone:#c62828}
.state{font-weight:600;color:color-mix(in srgb,var(--tone) 78%,var(--ink))}
table.compact td{min-width:0}
table.compact th,table.compact td{padding-left:10px;padding-right:10px}
table.compact tbody th::before{width:6em}
table.compact td:last-child:not(.n){min-width:11em}
table.events td:last-child{min-width:24em;overflow-wrap:anywhere}
.moment,.noise,.compact .hash{white-space:nowrap}
figure svg.lineage{display:block;width:100%;min-width:760px;height:auto;margin:6px 0}
figure.lineage{overflow-x:auto}
.lineage figcaption{overflow-wrap:anywhere}
.lineage text{fill:var(--ink);font:13px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.lineage .t{font-weight:600;font-size:14px}
.lineage .m{fill:var(--muted);font-size:12px}
.lineage .h{fill:var(--muted);font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.lineage rect{fill:var(--page);stroke:var(--grid);stroke-width:1.5}
.lineage .model rect{stroke:var(--c2);stroke-width:2}
.lineage .round rect{stroke:var(--c0)}
.lineage path{fill:none;stroke:var(--muted);stroke-width:1.5}
.lineage .tip{fill:var(--muted);stroke:none}
@media (max-width:560px){table.compact td:last-child:not(.n){min-width:22em}}
@media print{.lineage{min-width:0}}
"""

_CANNOT = (
    "That an event is missing which was never written. A log shows what its owner wrote down, and that it was not "
    "changed afterwards; it cannot show that the owner told the truth.",
    "That events behind the last remembered head are all there. Nobody else vouches for them until the other side has "
    "written down a later head; the table of logs says how far each log is vouched for.",
    "That both sides did not agree to rewrite both logs. Keep copies of the heads with a third party if that matters.",
    "What the images or labels were. A data manifest is a hash: with the site's own files it can be compared, without "
    "them it tells nothing.",
    "That installed packages are unchanged since they were installed. Their hashes are those of the installer's list.",
)


def page(told: Account) -> str:
    """The whole document; nothing in it is fetched and nothing runs."""
    sections: list[tuple[str, str, Child]] = [("logs", "Verification", _logs(told))]
    for number, story in enumerate(told.stories, start=1):
        name = _name(story)
        sections.append((f"story{number}", f"What was trained: {name}", _story(story)))
    sections += [
        ("refused", "Refusals", _lines(told.refusals, "No refusal is in the logs.")),
        ("people", "Who signed, approved and operated", _lines(told.people, "No approval and no action of an operator "
         "is in the logs; a simulation has neither.")),
        ("keys", "Members, keys and revocations", _lines(told.members, "The logs name no keys.", whole=True)),
        ("running", "Starts and stops, configuration, code", _lines(told.running, "None is in the logs.", folded=True)),
        ("other", "Other events", _lines(told.other, "") if told.other else None),
        ("cannot", "What this report cannot show", items(*_CANNOT)),
    ]  # fmt: skip
    top = (
        tag("p", "Audit report", class_="eyebrow"),
        tag("h1", _title(told)),
        tag("p", _span(told), class_="meta"),
        _verdict(told),
        _cards(told),
    )
    title, footer = f"Fedicom audit: {_title(told)}", "Written by Fedicom from the signed logs alone."
    return document(title, top, sections, footer, css=_CSS)


# The verdict


def _title(told: Account) -> str:
    names = [_name(story) for story in told.stories]
    return names[0] if len(names) == 1 else f"{len(names)} recipes" if names else "no training"


def _name(story: Story) -> str:
    return _given_name(story) or f"recipe {story.recipe_id[:12]}"


def _given_name(story: Story) -> str:
    return str(story.recipe.get("name") or story.name or "")


def _span(told: Account) -> str:
    times = sorted(time for log in told.logs for time in (log.first, log.last) if time)
    return f"Events from {moment(times[0])} to {moment(times[-1])}" if times else "No event could be read"


def _verdict(told: Account) -> Html:
    logs = number_of(len(told.logs), "log")
    notes: list[Child] = []
    if told.state == "broken":
        kind, title = "bad", "NOT verified"
        first = (
            "Do not rely on what stands below: of a log that does not hold by itself, only the events ahead of the "
            "first bad one are used."
        )
        notes = [f"{check.log} against {check.against}: {check.why}" if check.against else check.why
                 for check in told.checks if not check.holds]  # fmt: skip
    elif told.state == "alone":
        kind, title = "part", "Each log holds by itself, but not all are verified against the other side"
        vouched = {check.log for check in told.checks if check.anchors}
        alone = [log.name for log in told.logs if log.name not in vouched and log.role != "authority"]
        first = (
            "An owner could have cut or rewritten a log that no other log remembers: "
            f"{', '.join(alone)}. Add the other side's log."
        )
    else:
        kind, title = "ok", "Verified"
        first = (
            f"{logs}: every event follows the one before it, carries the signature of its log's key, and has a time "
            "that fits; each log holds every head that the other side wrote down."
        )
    if told.absent:
        notes.append(f"Not there: the log of {', '.join(told.absent)}. What they did is told by the coordinator alone.")
    if told.untold:
        notes.append(f"Left a site, and not in the coordinator's log: {', '.join(told.untold)}; see their fate below.")
    if not all(log.key_known for log in told.logs):
        notes.append("The keys were taken from the logs themselves: give --registry to check who signed.")
    if moved := sum(line.kind == "clock moved back" for line in told.running):
        notes.append(f"A clock moved back {number_of(moved, 'time')}; see starts and stops.")
    broken = [why for story in told.stories for why in story.broken]
    if broken and told.state != "broken":
        notes += [f"Lineage does not hold: {why}" for why in broken]
        kind, title = "bad", f"{title}, but a lineage does not hold"
    return tag(
        "div",
        tag("h2", title),
        tag("p", first),
        items(*notes) if notes else None,
        class_=f"verdict {kind}",
        role="note",
    )


def _cards(told: Account) -> Html:
    sites = {site.name for story in told.stories for site in story.sites}
    spent = [site.epsilon for story in told.stories for site in story.sites if site.epsilon is not None]
    paid = [site.scores_epsilon for story in told.stories for site in story.sites if site.scores_epsilon is not None]
    scores = f"; of noised scores {_epsilon(max(paid))}" if paid else ""
    sent = [item for story in told.stories for item in story.sent if item.what.startswith("update")]
    trained = [site for story in told.stories for site in story.sites if "train" in site.patients]
    train = [site.patients["train"] for site in trained]
    rounded = any(site.counts_rounded and site.patients["train"] for site in trained)
    return tag(
        "div",
        card("Logs", str(len(told.logs)), number_of(sum(log.events for log in told.logs), "event")),
        card("Sites", str(len(sites))),
        card("Rounds", str(sum(story.rounds for story in told.stories)), "aggregated"),
        card("Training patients", f"{sum(train):,}" if any(train) else "–", _summed(train, rounded)),
        card("Epsilon of updates", _epsilon(max(spent, default=None)), f"highest of any site, one recipe{scores}"),
        card("Updates sent", f"{len(sent):,}", _sizes([item.bytes for item in sent])),
        class_="cards",
    )


def _summed(counts: Sequence[int], rounded: bool) -> str:
    untold = f"; {counts.count(0)} not told" if 0 in counts else ""
    return f"sum over sites and recipes{'; rounded down' * rounded}{untold}"


def _sizes(found: Sequence[int | None]) -> str:
    known, untold = [size for size in found if size is not None], found.count(None)
    return "; ".join([*[_size(sum(known))] * bool(known), *[f"size of {untold} not told"] * bool(untold)])


def _logs(told: Account) -> Html:
    def by_itself(log: LogLine) -> Html:
        check = next(check for check in told.checks if check.log == log.name and check.against is None)
        if check.holds:
            return tag("span", "holds", class_="state ok")
        return join(tag("span", "does not hold", class_="state bad"), tag("br"), check.why)

    def against(log: LogLine) -> Child:
        said: list[Child] = []
        for check in told.checks:
            if check.log != log.name or check.against is None:
                continue
            if not check.holds:
                text: Child = join(tag("span", "does not hold", class_="state bad"), f": {check.why}")
            elif not check.anchors:
                text = "remembers no head of it"
            else:
                behind = log.events - 1 - (check.vouched or 0)
                text = f"remembers {number_of(check.anchors, 'head')}, up to event {check.vouched}" + (
                    f"; {behind} later one{'s' if behind > 1 else ''} not yet" if behind else ""
                )
            said.append(tag("div", f"{check.against}: ", text))
        return join(*said) if said else "is remembered by nobody" if log.role == "authority" else "–"

    rows = [
        (
            log.name,
            join(log.file, tag("span", f"and {log.parts} earlier", class_="sub") if log.parts else None),
            f"{log.events:,}",
            join(_second(log.first), tag("br"), _second(log.last)) if log.first else "–",
            join(_hash(log.key), tag("span", "given key" if log.key_known else "its own word", class_="sub")),
            by_itself(log),
            against(log),
        )
        for log in told.logs
    ]
    head = ("Log", "File", "Events", "First and last", "Signed by", "By itself", "What the other side remembers")
    text = (
        "Each log is a chain of signed events. Both sides write down the head of the other's chain, so neither can cut "
        f"or rewrite its log alone. Times may disagree by {told.tolerance_s:g} s."
    )
    return join(
        tag("p", text),
        table(head, rows, caption="Logs and whether they hold", numbers_from=99, class_="compact events"),
    )


# One recipe


def _story(story: Story) -> Html:
    recipe = story.recipe
    privacy = recipe.get("privacy", {})
    facts: list[tuple[str, Child]] = [
        ("Recipe", join(_given_name(story), " ", _hash(story.recipe_id))),
        ("From, to", f"{moment(story.first)} to {moment(story.last)}"),
        ("Rounds", f"{story.rounds} aggregated; " + ("concluded" if story.concluded else "not concluded")),
        ("Signed by", _hash(story.coordinator) if story.coordinator else "not in the logs"),
    ]
    if recipe:
        task = recipe.get("task", {})
        facts += [
            ("Told apart", ", ".join(map(str, task.get("classes", ())))),
            ("Privacy", "none: nothing bounds what the model reveals" if privacy.get("mechanism") == "none" else
             f"{privacy.get('mechanism')}, epsilon {privacy.get('epsilon')}, delta {privacy.get('delta')}, clip norm "
             f"{privacy.get('clip_norm')}"),
        ]  # fmt: skip
    return join(
        tag("p", str(recipe["description"])) if recipe.get("description") else None,
        pairs(*facts),
        tag("h3", "Sites, patients and approvals"),
        table(
            ("Site", "Patients", "Data manifest", "Approved by", "Epsilon of updates", "Updates", "Bytes"),
            (_site(site) for site in story.sites),
            caption="Patients are given by split; a count is not told where it is too small, by policy, or under masks",
            numbers_from=4,
            class_="compact",
        ),
        tag("h3", "Lineage"),
        *(_lineage(found, _name(story)) for found in story.lineages),
        *(tag("div", tag("p", "Lineage does not hold. ", why), class_="verdict bad") for why in story.broken),
        None if story.lineages or story.broken else tag("p", "No model was exported.", class_="muted"),
        tag("h3", "What left the sites"),
        _left(story.sent),
        tag(
            "details",
            tag("summary", "The recipe, whole"),
            tag("pre", json.dumps(recipe, indent=2, sort_keys=True, ensure_ascii=False)),
        )
        if recipe
        else tag(
            "p", "The recipe's content is not at hand; its id is the SHA-256 of its canonical JSON.", class_="muted"
        ),
    )


def _site(site: SiteLine) -> Sequence[Child]:
    return (
        join(site.name, None if site.log else tag("span", "log not there", class_="sub")),
        counted(site.patients, site.counts_rounded),
        join(*_apart(map(_hash, site.manifests))) if site.manifests else "not told",
        join(*_apart(map(_approval, site.approvals))) if site.approvals else "no approval in the log",
        join(
            _epsilon(site.epsilon),
            tag("span", f"delta {site.delta:g}", class_="sub") if site.delta is not None else None,
            None
            if site.scores_epsilon is None
            else tag("span", f"and {_epsilon(site.scores_epsilon)} of scores", class_="sub"),
        ),
        f"{site.updates:,}",
        _size(site.bytes) if site.bytes else "–",
    )


def _approval(approval: Approval) -> Html:
    return join(approval.by or "unnamed", tag("span", moment(approval.time), class_="sub"))


def _noise(item: Sent) -> Child:
    if item.noise_multiplier:
        return tag("span", f"{_figure(item.clip_norm)} / {_figure(item.noise_multiplier)}", class_="noise")
    # The coordinator's log does not tell how an update was noised, and an evaluation is none.
    return "none" if item.told_by == item.site and item.what.startswith("update") else "–"


def _left(sent: Sequence[Sent]) -> Html:
    if not sent:
        return tag("p", "Nothing.", class_="muted")
    rows = [
        (
            item.site,
            _second(item.time),
            item.what,
            str(item.round),
            f"{item.bytes:,}" if item.bytes is not None else "–",
            _hash(item.digest) if item.digest else "–",
            _figure(item.norm),
            _noise(item),
            _epsilon(item.epsilon),
            item.scores,
            item.fate or "–",
        )
        for item in sent
    ]
    head = (
        "Site", "Time", "What", "Round", "Bytes", "Digest", "Norm", "Clip / noise", "Epsilon of updates", "Scores",
        "Fate",
    )  # fmt: skip
    shown = table(
        head, rows, caption="Every message with results, as the logs have it", numbers_from=99, class_="compact"
    )
    if len(rows) > _OPEN_ROWS:
        shown = tag("details", tag("summary", f"{len(rows):,} messages"), shown)
    text = (
        "Beside these a site sends only who it is (versions, patient counts, manifest hash, head of its log) and "
        "refusals. Scores are bounded numbers about its validation and test patients; where a site noised them, the "
        "table of sites says what they cost."
    )
    return join(tag("p", text), shown)


# The drawing


def _lineage(found: Lineage, name: str) -> Html:
    sites = list(found.sites.values())
    rows = len(sites) if len(sites) <= _MOST_BOXES else _MOST_BOXES + 1
    height = max(rows * 82, 222)
    middle = height / 2
    boxes: list[Html] = []
    lines: list[Html] = []
    step = height / rows
    for place, site in enumerate(sites[:_MOST_BOXES]):
        y = step * place + step / 2
        train = site.patients.get("train")
        # What does not fit into the box is cut, and epsilon stands last.
        count = f"{'at least ' * site.counts_rounded}{train} patients" if train else "patients not told"
        spent = f", epsilon {_epsilon(site.epsilon)}" if site.epsilon is not None else ""
        manifest = site.manifests[0][:12] + (" …" if len(site.manifests) > 1 else "")
        boxes.append(_box(0, y, 250, 68, "site", site.name, f"{count}{spent}", f"manifest {manifest}"))
        lines.append(_line(250, y, 310, middle))
    if rows > _MOST_BOXES:
        y = step * _MOST_BOXES + step / 2
        boxes.append(_box(0, y, 250, 68, "site", f"{len(sites) - _MOST_BOXES} more sites", "in the table above", ""))
        lines.append(_line(250, y, 310, middle))
    rounds = found.rounds if len(found.rounds) <= 3 else (found.rounds[0], None, found.rounds[-1])
    x = 320.0
    for link in rounds:
        if x > 320:
            lines.append(_line(x - 18, middle, x - 2, middle))
        if link is None:
            between = f"{len(found.rounds) - 2} more"
            boxes.append(_box(x, middle, 130, 68, "round", between, "rounds", ""))
        else:
            count = number_of(len(link.admitted), "update")
            boxes.append(_box(x, middle, 130, 68, "round", f"Round {link.round}", count, link.after[:12]))
        x += 150
    recipe = name if name.startswith("recipe") else f"Recipe {name}"
    boxes.append(_box(320, middle - 82, x - 340, 54, "recipe", recipe, "", found.recipe_id[:12]))
    lines.append(_line(x - 18, middle, x + 18, middle))
    boxes.append(
        _box(x + 20, middle, 250, 88, "model", found.file, moment(found.exported), f"SHA-256 {found.sha256[:16]}",
             f"weights {found.weights[:16]}")
    )  # fmt: skip
    of_sites, of_rounds = number_of(len(sites), "site"), number_of(len(found.rounds), "round")
    words = (
        f"{of_sites}, {of_rounds}, one file: {found.file} with SHA-256 {found.sha256}. "
        f"Every link was checked: {'; '.join(found.checked)}. Not checked: {'; '.join(found.not_checked)}."
    )
    svg = tag(
        "svg", *lines, *boxes, viewBox=f"-2 -2 {x + 274:.0f} {height + 4:.0f}", class_="lineage", role="img",
        style=f"max-width:{x + 400:.0f}px",
        aria_label=f"From the data of {of_sites} over {of_rounds} to {found.file}",
    )  # fmt: skip
    return tag("figure", svg, tag("figcaption", words), class_="lineage")


def _box(x: float, y: float, width: float, height: float, kind: str, title: str, more: str, *hashes: str) -> Html:
    """A box around the height `y` with a title, a line of text, and hashes."""
    top = y - height / 2
    below = top + 24
    shown = [
        tag("rect", x=f"{x:.0f}", y=f"{top:.0f}", width=f"{width:.0f}", height=f"{height:.0f}", rx="8"),
        tag("text", _cut(title, int(width / 9.2)), x=f"{x + 12:.0f}", y=f"{below:.0f}", class_="t"),
    ]
    for text, style in ((more, "m"), *((each, "h") for each in hashes)):
        if text:
            below += 18
            shown.append(tag("text", _cut(text, int(width / 6.4)), x=f"{x + 12:.0f}", y=f"{below:.0f}", class_=style))
    return tag("g", *shown, class_=kind)


def _line(x1: float, y1: float, x2: float, y2: float) -> Html:
    bend = (x1 + x2) / 2
    path = f"M{x1:.0f} {y1:.0f}C{bend:.0f} {y1:.0f} {bend:.0f} {y2:.0f} {x2 - 8:.0f} {y2:.0f}"
    tip = f"M{x2 - 9:.0f} {y2 - 5:.0f}L{x2:.0f} {y2:.0f}L{x2 - 9:.0f} {y2 + 5:.0f}Z"
    return join(tag("path", d=path), tag("path", d=tip, class_="tip"))


# Lists of events


def _lines(lines: Sequence[Line], none: str, *, folded: bool = False, whole: bool = False) -> Child:
    if not lines:
        return tag("p", none, class_="muted") if none else None
    rows = [
        (_second(line.time), line.log, str(line.number), line.kind, _facts(line.facts, whole=whole)) for line in lines
    ]
    shown = table(
        ("Time", "Log", "Event", "What", "Facts"), rows, caption="Times are UTC, by the clock of the log's owner",
        numbers_from=99, class_="compact events",
    )  # fmt: skip
    if folded and len(rows) > _OPEN_ROWS:
        return tag("details", tag("summary", number_of(len(rows), "event")), shown)
    return shown


def _facts(facts: Mapping[str, Any], *, whole: bool) -> str:
    """Facts in words; a hash is given by its start unless it is wanted `whole`, to be compared."""
    said = "; ".join(f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in facts.items()) or "–"
    return said if whole else re.sub(r"\b[0-9a-f]{40,}\b", lambda found: f"{found[0][:12]}…", said)


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:.6g}" if isinstance(value, float) else _cut(str(value), 500)


def _apart(children: Iterable[Child]) -> list[Child]:
    found: list[Child] = []
    for child in children:
        found += [tag("br"), child] if found else [child]
    return found


def _hash(text: str) -> Html:
    return tag("span", text[:12], class_="hash", title=text)


def _second(iso: str) -> Html:
    """To the second, on one line."""
    return tag("span", iso[:19].replace("T", " "), class_="moment", title=iso)


def _epsilon(value: float | None) -> str:
    return "–" if value is None else rounded_up(value)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
