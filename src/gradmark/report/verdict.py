"""The report of one verification, for readers who weren't there: auditors and lawyers. Holds no secret."""

from __future__ import annotations

from dataclasses import replace

from gradmark.protocols import Outcome, Verdict
from gradmark.report.bets import bets_by_queries
from gradmark.report.caveats import LINEAR, limits, reproduce, wrong
from gradmark.report.model import Figure, Report, RowMark, Section, Table, Tone
from gradmark.report.plots import evidence_by_queries, history_curve, readings
from gradmark.report.words import (
    CARRIERS,
    PROGRAM,
    TESTS,
    by_chance,
    duration,
    level,
    percent,
    probability,
    versions,
)
from gradmark.stats import run_test, wilson_interval

TONES: dict[Outcome, Tone] = {"owned": "owned", "no-evidence": "none", "inconclusive": "inconclusive"}
_LABELS: dict[tuple[Outcome, bool | None], str] = {
    ("owned", False): "Mark found, model untouched",
    ("owned", True): "Mark found, model modified",
}  # with no-evidence and inconclusive, the four outcomes
_PLAIN: RowMark = "plain"
_MARKS: dict[Outcome, RowMark] = {"owned": "good", "no-evidence": "bad", "inconclusive": "plain"}
_WON = "What one unit had become by betting on the bits, as a power of ten; fair coins let nothing grow."
_MODIFIED = {
    True: ("yes", "The suspect isn't, bit for bit or in its answers, the model that was sealed."),
    False: ("no", "The suspect agrees with the seal that the owner made of the model."),
}


def verdict_report(
    verdict: Verdict,
    *,
    owner: str,
    suspect_name: str,
    data_name: str,
    linear: bool = False,
    parts: tuple[str, ...] = (),
    claim: Section | None = None,
    again: Section | None = None,
    label: str = "",
) -> Report:
    """What was asked, the answer, how it was tested, the numbers, their limits, and how to repeat it all.

    ``linear``: the mark came as arrays made by other software, so that no key binds it. ``parts``: the names
    of an ensemble's schemes, in order. ``claim``: what the claim says, where a judge tested by one;
    ``again``: how he repeats it, ``label``: his ruling in a word.
    """
    return Report(
        title=f"Whose model is {suspect_name}?",
        question=f"Does {suspect_name} carry the mark of {owner}?",
        answer=answer(verdict, owner, suspect_name, linear=linear),
        tone=TONES[verdict.outcome],
        sections=(
            _how(verdict, data_name, linear, parts),
            numbers(verdict),
            *pictures(verdict),
            *((claim,) if claim is not None else ()),
            *modification(verdict),
            limits(verdict, suspect_name, linear),
            wrong(verdict, linear),
            again or reproduce(verdict, linear),
        ),
        footer=versions(verdict.version),
        label=label or _LABELS.get((verdict.outcome, verdict.modified), ""),
    )


def answer(verdict: Verdict, owner: str, suspect_name: str, *, linear: bool = False) -> str:
    """The outcome in one or two sentences, with its odds in words."""
    chance = by_chance(verdict.log10_p, "such arrays" if linear else "keys")
    if verdict.outcome == "owned":
        text = f"Yes: the mark of {owner} was found in {suspect_name}. {chance}"
    elif verdict.outcome == "no-evidence":
        text = (
            f"No evidence was found that {suspect_name} carries the mark of {owner}. {chance} The test asks "
            f"for a p-value of {level(verdict.alpha)} or less. This does not prove that the model is free of "
            "the mark."
        )
    else:
        reason = (verdict.reason or "too few readings could be used").rstrip(".")
        text = (
            f"The test could not decide whether {suspect_name} carries the mark of {owner}: {reason}. This "
            "counts neither for nor against anybody."
        )
    return f"{text} Condition: {LINEAR}." if linear else text


def numbers(verdict: Verdict) -> Section:
    """Every number of the verdict with its meaning."""
    used = max(verdict.n_bits - verdict.ties, verdict.n_match)
    low, high = wilson_interval(verdict.n_match, used)
    good = _MARKS[verdict.outcome]
    tried = "already included in p" if verdict.keys_tried > 1 else "p needed no correction"
    won = () if verdict.log10_e is None else (("log10 e", f"{verdict.log10_e:.2f}", _WON),)
    sealed = () if verdict.modified is None else (("Changed since sealed", *_MODIFIED[verdict.modified]),)
    rows = (
        ("p-value", probability(verdict.log10_p), "The chance that an uninvolved key matches so well."),
        ("log10 p", f"{verdict.log10_p:.2f}", "The same as a power of ten: one less is ten times stronger."),
        *won,
        ("Threshold", f"p ≤ {level(verdict.alpha)}", "The mark counts as found if p is no larger (alpha)."),
        ("Bits that match", f"{verdict.n_match} of {used} ({percent(verdict.match)})",
         f"Chance alone gives about half. 95% interval, if bits err on their own: {percent(low)} to "
         f"{percent(high)}."),
        ("Bits in the mark", str(verdict.n_bits), "Each is one yes-or-no question put to the model."),
        _left_out(verdict),
        ("Carriers", str(verdict.carriers), "Inputs at which the model was read, at most, by one part."),
        ("Queries", str(verdict.queries),
         f"Single inputs sent to the model, of the {verdict.queries_allowed or verdict.queries} allowed."
         if verdict.access == "black" else "None: the model was at hand."),
        ("Keys tried", str(verdict.keys_tried), f"How many keys were tried on this model; {tried}."),
        *sealed,
        ("Time", duration(verdict.seconds), "What reading and testing took."),
        ("Scheme", verdict.scheme, "The way in which the bits are carried."),
        ("Fingerprint of the mark", verdict.mark or "none", "SHA-256 of the mark's file: which mark it was."),
        ("Fingerprint of the suspect", verdict.suspect or "none",
         "SHA-256 of the model's file or weights, or of the address where it is offered."),
    )  # fmt: skip
    marks = (good, good, *[good for _ in won], _PLAIN, good)
    return Section("The numbers", tables=(Table(("Number", "Value", "Meaning"), rows, mark=marks),))


def _left_out(verdict: Verdict) -> tuple[str, str, str]:
    if verdict.test == "betting":
        return (
            "Bits not asked",
            str(verdict.ties),
            "The evidence sufficed before their turn; none counts as wrong.",
        )
    return "Readings of zero", str(verdict.ties), "Readings that said nothing; the test leaves them out."


def pictures(verdict: Verdict) -> tuple[Section, ...]:
    """The readings, and the evidence against queries if the reading has a history."""
    reading = verdict.reading
    if reading is None or not len(reading.values):
        return ()
    words = [
        "A reading tells how clearly, and in which direction, the model answers one bit of the mark. "
        "Multiplied by its bit (+1 or -1), it is positive where the model agrees with the mark. The bars are "
        "sorted, so that the picture gives away nothing about the mark. Without the mark, about as many lie "
        "below zero as above."
    ]
    asked = reading.values != 0
    if verdict.test == "betting" and bool(asked.any()):  # the others weren't looked at
        reading = replace(reading, values=reading.values[asked], bits=reading.bits[asked])
    figures: list[Figure] = [readings(reading)]
    if verdict.test == "betting":
        if verdict.evidence:
            figures.append(bets_by_queries(verdict.evidence, verdict.alpha / verdict.keys_tried))
            words.append(
                "The second picture shows what the bets had won after each round of questions. The evidence "
                "is valid wherever the line stops."
            )
    elif curve := history_curve(reading, verdict.test, verdict.keys_tried):
        figures.append(evidence_by_queries({"this model": curve}, verdict.alpha))
        words.append(
            "The second picture shows the evidence as questions were added. It is an illustration: the "
            "verdict uses only the end of the line, at the number of queries that was set in advance."
        )
    return (Section("The readings", tuple(words), figures=tuple(figures)),)


def modification(verdict: Verdict) -> tuple[Section, ...]:
    """Whether the suspect was changed since it was sealed: what of it was tested, and the answer."""
    if verdict.modified is None:
        text = (
            "Not tested: no seal was given. A mark survives many changes of a model, so finding it doesn't "
            "show that the model is as its owner left it. The owner's seal, made before release, would."
        )
    elif verdict.modified:
        text = f"Yes. {_MODIFIED[True][1]} How strongly it differs, and where, gradmark check tells."
    elif verdict.own_program:
        text = f"Not its weights. {PROGRAM}"
    else:
        text = f"No. {_MODIFIED[False][1]}"
    return (Section("Was it modified?", (text,)),)


def _how(verdict: Verdict, data_name: str, linear: bool, parts: tuple[str, ...]) -> Section:
    source = "in the arrays that were given" if linear else "drawn from the owner's secret key"
    name, explained = TESTS[verdict.test]
    if verdict.access == "white":
        access = "The model itself was at hand, so that its weights and its derivatives could be read."
    else:
        access = (
            f"The model was only asked questions: {verdict.queries} single inputs were sent, and nothing but "
            "the answers was used."
        )
    chosen = "all that the arrays ask for" if linear else "chosen by the key and not by hand"
    texts = [
        f"A mark is a list of {verdict.n_bits} secret questions to the model. Each has a bit, its answer, "
        f"that was fixed along with it; both are {source}. To place a mark, the owner trains the model until "
        "its answers agree with the bits. A model made without the bits can agree with them only by chance.",
        access,
        f"Natural inputs, where the questions use any, are {verdict.carriers} of {data_name}, {chosen}.",
        f"{name}. {explained}",
        "Only more agreement than chance gives counts as evidence; a model that systematically disagrees "
        "doesn't pass.",
    ]
    table = carriers(verdict, parts or (verdict.scheme,))
    if len(table.rows) > 1 and verdict.test != "betting":
        texts.append(
            "The parts of the mark have bits of their own, and are tested apart. Their p-values are combined "
            "by Fisher's method: no part can be left out afterwards because it did badly."
        )
    return Section("How it was tested", tuple(texts), tables=(table,))


def carriers(verdict: Verdict, names: tuple[str, ...]) -> Table:
    """One row for each part of the mark: what is asked, and how it went unless bets were on all together."""
    asked = {name: CARRIERS.get(name, CARRIERS["linear"]) for name in names}
    if verdict.test == "betting":
        return Table(("Part of the mark", "What is asked"), tuple(asked.items()))
    reading = verdict.reading
    values = None if reading is None else (reading.values * reading.bits).numpy()
    sizes = reading.parts if reading is not None and len(reading.parts) == len(names) else ()
    rows, first = [], 0
    for name, size in zip(names, sizes or (verdict.n_bits,) * len(names), strict=True):
        match = p = ""
        if values is not None and (sizes or len(names) == 1):
            result = run_test(verdict.test, values[first:][:size])
            match = f"{result.n_match} of {result.n}" if result.n else "not read"
            p = probability(result.log10_p) if result.n else ""
        first += size
        rows.append((name, asked[name], match, p))
    return Table(("Part of the mark", "What is asked", "Bits that match", "p-value"), tuple(rows))
