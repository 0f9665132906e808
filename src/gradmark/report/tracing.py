"""The report of a trace: whose copy is it, for readers who weren't there. Names nobody but the named."""

from __future__ import annotations

import math

import numpy as np

from gradmark.report.canvas import BLUE, RED, canvas, threshold
from gradmark.report.model import Figure, Report, Section, Table, Tone
from gradmark.report.words import TESTS, by_chance, duration, level, percent, probability, versions
from gradmark.trace import Trace

_TONES: dict[str, Tone] = {"named": "owned", "no-evidence": "none", "inconclusive": "inconclusive"}
_LINEAR = 20  # licensees, up to which their ranks stand at equal distances
_LABELS = {"named": "Named", "no-evidence": "No evidence", "inconclusive": "Inconclusive"}


_WRONG = (
    ("The list was made to fit", "Licensees were left out or added until the result pleased."),
    ("The key isn't secret", "Whoever has it can make any licensee's copy."),
    (
        "A name was written otherwise",
        "A licensee's bits hang on the letters of his name when his copy was made.",
    ),
    ("Another model was read", "The file or address isn't the one in dispute: compare the fingerprint."),
    ("More was tried than stated", "Suspects, keys or settings were varied until somebody was named."),
)


def trace_report(found: Trace, *, owner: str, suspect_name: str, data_name: str) -> Report:
    """Question, answer, how it was tested, the picture, the numbers and their limits, how to repeat it."""
    return Report(
        title=f"Whose copy is {suspect_name}?",
        question=f"From whose copy does {suspect_name} come? {owner} has {found.licensees:,} licensees.",
        answer=_answer(found, owner, suspect_name),
        tone=_TONES[found.outcome],
        sections=(
            _how(found, data_name),
            Section("All licensees", _PICTURE, figures=(all_licensees(found),)),
            _numbers(found),
            Section("What this does not say", _limits(found)),
            Section("What would make it wrong", tables=(Table(("If", "That is"), _WRONG),)),
            _reproduce(found),
        ),
        footer=versions(found.version),
        label=_LABELS[found.outcome],
    )


def all_licensees(found: Trace) -> Figure:
    """Every licensee's p against his rank in the first round, and the line of ``alpha``."""
    order = np.argsort(found.ranking, kind="stable")
    log10_p, rank = found.ranking[order], np.arange(1, len(order) + 1)
    place = {int(i): r for r, i in zip(rank, order, strict=True)}
    named = [(place[one.index], one.log10_p) for one in found.named]
    # a dot for everybody would be a file of megabytes: all of the first, and ever fewer of the rest
    some = np.unique(np.concatenate([rank[:50], np.geomspace(1, len(rank), 400).astype(int)]))
    rest = np.setdiff1d(some, [r for r, _ in named]) - 1
    few = len(rank) <= _LINEAR
    with canvas(7.2, 3.4) as c:
        axes = c.axes[0][0]
        axes.plot(rank[rest], log10_p[rest], "o", color=BLUE, markersize=3, label="not named")
        if named:
            axes.plot(*zip(*named, strict=True), "D", color=RED, markersize=6, label="named")
        threshold(axes, math.log10(found.alpha), f"threshold, p = {level(found.alpha)}")
        axes.set(
            xscale="linear" if few else "log",
            xlabel="licensees, by rank",
            ylabel="log10 p, corrected\n(lower = stronger evidence)",
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        if few:
            axes.locator_params(axis="x", integer=True)
        axes.legend(loc="center right")
    first = f" The first of the others is at {log10_p[rest[0]]:.1f}." if len(rest) else ""
    alt = (
        f"{found.licensees:,} licensees by rank; {len(named)} are named, "
        f"below the threshold of {math.log10(found.alpha):.1f}.{first}"
    )
    return Figure("Every licensee's p, corrected for the number of licensees", alt, c.data, "svg")


def _answer(found: Trace, owner: str, suspect_name: str) -> str:
    if found.outcome == "named":
        names = ", ".join(one.licensee for one in found.named)
        mixed = " The model is a mixture of their copies." if len(found.named) > 1 else ""
        chance = by_chance(max(one.log10_p for one in found.named), "lists of licensees")
        return f"{suspect_name} comes from the copy of: {names}.{mixed} {chance}"
    told = f"Nobody is named: {found.reason}."
    if found.outcome == "no-evidence":
        return f"{told} This doesn't prove that {suspect_name} comes from no licensee's copy."
    return f"{told} This counts neither for nor against anybody."


_PICTURE = (
    "Each dot is one licensee: how well the model agrees with the bits in his copy. Licensees whose copies "
    "aren't in the model lie where chance puts them, near p = 1 at the top: p is multiplied by the number of "
    "licensees. Their names aren't shown.",
)


def _how(found: Trace, data_name: str) -> Section:
    name, explained = TESTS[found.test]
    access = (
        "The model itself was at hand."
        if found.access == "white"
        else f"The model was only asked questions: {found.queries} single inputs were sent."
    )
    return Section(
        "How it was tested",
        (
            f"Every licensee's copy answers the same {found.n_bits} secret questions, and each licensee has "
            "bits of his own, derived from the owner's key and his name: which way his copy leans at each "
            "question. The model was read once, and the readings were compared with everybody's bits.",
            f"{access} Readings were taken at {found.carriers} inputs from {data_name}, chosen by the key.",
            f"{name}. {explained}",
            "p is multiplied by the number of licensees, and by two for each round: after the first, what "
            "the bits of the named licensees explain is taken away and the others are tested again, so that "
            "several who mixed their copies are found one after the other. All rounds together name an "
            f"innocent with a chance of at most {level(found.alpha)}.",
        ),
    )


def _numbers(found: Trace) -> Section:
    rows = [
        (f"Named: {one.licensee}", f"p = {probability(one.log10_p)}",
         f"{percent(one.match)} of the usable bits agree with his; found in round {one.round}.")
        for one in found.named
    ]  # fmt: skip
    rows += [
        ("Threshold", f"p ≤ {level(found.alpha)}", "A licensee is named if his corrected p is no larger."),
        ("Least p, first round", probability(found.log10_p), "Corrected for licensees and rounds."),
        ("Licensees", f"{found.licensees:,}", "All that were on the list; p is multiplied by their number."),
        ("Keys or suspects tried", str(found.keys_tried), "In this search; p is multiplied by their number."),
        ("Queries", str(found.queries), "Single inputs sent to the model."),
        ("Bits in a copy", str(found.n_bits), f"{found.ties} of them gave no reading."),
        ("Base mark", "not asked" if found.owned is None else found.owned.outcome,
         "Whether the model is the owner's at all; asked where nobody is named."),
        ("Time", duration(sum(found.seconds.values())), "What reading and testing took."),
        ("Fingerprint of the tracing mark", found.trace, "SHA-256 of trace.json."),
        ("Fingerprint of the base mark", found.mark, "SHA-256 of mark.json."),
        ("Fingerprint of the suspect", found.suspect, "SHA-256 of the model's file, or of its address."),
    ]  # fmt: skip
    return Section("The numbers", tables=(Table(("Number", "Value", "Meaning"), tuple(rows)),))


def _limits(found: Trace) -> tuple[str, ...]:
    return (
        "It names a copy, not a culprit: the copy may have been stolen from its licensee.",
        "It rests on the owner's honesty about two things: that the copy with these bits went to this "
        "licensee and to nobody else, and that the owner didn't make the suspect himself, which his key "
        "allows. Records of what was delivered to whom (the file's SHA-256, countersigned) belong beside "
        "this report.",
        "The tracing mark and the list of licensees must be older than the suspect: a time stamp of "
        "trace.json shows the first.",
        f"p is corrected for the {found.licensees:,} licensees on the list and what was stated as tried.",
        "Who isn't named isn't cleared: large changes to a model, and mixtures of many copies, hide a "
        "copy's bits.",
    )


def _reproduce(found: Trace) -> Section:
    queries = f" --queries {found.queries_allowed}" if found.access == "black" else ""
    command = (
        "gradmark trace SUSPECT --licensees LIST --key OWNER.key --mark mark.json --data DATA \\\n"
        f"    --access {found.access}{queries} --alpha {found.alpha:g} --report again.html"
    )
    return Section(
        "How to reproduce this",
        ("trace.json lies beside mark.json; the fingerprints above tell which ones. The key is a secret: its "
         "owner runs the command before witnesses, or shows the key to a neutral expert.",),
        code=(command,),
    )  # fmt: skip
