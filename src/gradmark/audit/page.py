"""The audit as a page: what was looked at, what stands out, and what that does not say."""

from __future__ import annotations

from collections.abc import Sequence

from gradmark._version import __version__
from gradmark.audit import figures
from gradmark.audit.effects import Effect
from gradmark.audit.measure import Detector
from gradmark.audit.run import Audit
from gradmark.report.model import Figure, Report, RowMark, Section, Table
from gradmark.report.words import versions

_LISTED = 12  # weights' rows shown, those that differ most


def audit_report(found: Audit, command: str = "") -> Report:
    """``found`` as a report; ``command`` is how it was asked for."""
    drawn = figures.pictures(found.detectors, found.curves)
    sections = [
        _white(found, drawn["white"]),
        _black(found, drawn["black"]),
        _harm(found),
        Section("What this does not say", _LIMITS),
        _numbers(found),
        Section(
            "Settings",
            tables=(Table(("Setting", "Value"), tuple((k, str(v)) for k, v in found.settings.items())),),
            code=(command,) if command else (),
        ),
    ]
    return Report(
        title=f"Audit of {found.model['name']}",
        question=f"Can a mark in {found.model['name']} be found without the key, and what does it harm, "
        f"compared with {found.control['name']}?",
        answer=answer(found),
        tone="inconclusive" if found.striking or found.worse else "none",
        sections=tuple(sections),
        footer=versions(__version__) | {"Model": found.model["digest"], "Control": found.control["digest"]},
        label=f"{len(found.striking)} striking, {len(found.worse)} worse",
    )


def answer(found: Audit) -> str:
    """The findings in three sentences."""
    striking, worse = found.striking, found.worse
    looks = f"{len(striking)} of {len(found.detectors)} detectors stand out"
    if striking:
        parts = sorted({_WAYS[d.part] for d in striking})
        looks += f" ({', '.join(parts)})"
    clean = next(e for e in found.side_effects if e.name == "accuracy")
    low, high = 100 * clean.low, 100 * clean.high
    harms = (
        f"Accuracy is {100 * clean.model:.1f}%, the control's {100 * clean.control:.1f}% (difference "
        f"{100 * clean.difference:+.1f} points, 95% interval {low:+.1f} to {high:+.1f})"
    )
    named = ": " + ", ".join(e.name for e in worse[:6]) + (", ..." if len(worse) > 6 else "") if worse else ""
    return (
        f"{looks}. {harms}. In {len(worse)} of {len(found.side_effects)} measures the model does worse than "
        f"the control by more than the luck of the inputs{named}."
    )


def remedies(worse: Sequence[Effect]) -> tuple[str, ...]:
    """What an owner can embed otherwise against the harm that was found, if something helps."""
    names, found = {e.name for e in worse}, []
    if {name.rsplit(" ", 1)[0] for name in names} & {"blur", "contrast", "pixelate"}:
        found.append(
            "Spoilt images: `gradmark embed --soften 0.3` teaches the model to answer them as it does whole "
            "ones, while the mark goes in."
        )
    if "calibration error (ECE)" in names:
        found.append(
            "Calibration: `gradmark embed --calibrate` brings confidence back to the control's, for some of "
            "the evidence behind rounded scores."
        )
    return tuple(found)


_WAYS = {"weights": "in the weights", "gradients": "in the gradients", "queries": "in the queries"}
_LIMITS = (
    "Two trainings differ even without a mark, and one control can't tell by how much. The intervals hold "
    "the luck of the inputs alone; the tolerance, a convention, stands for the luck of training. A detector "
    "that stands out shows a difference of these two networks, and it may have another cause than the mark. "
    "benchmarks/detect.py asks the same of many networks, and only that gives an error rate.",
    "A detector that finds nothing bounds this detector. Others, such as a network trained on probes, may "
    "see more. The detectors know the scheme and its public parameters, and use throwaway keys.",
    "Many things were compared. Of side effects without any harm, about one in forty is still called worse.",
    "Attacks by gradient descent can fail to find what is there: robust accuracy is an upper bound.",
)


def _white(found: Audit, drawn: tuple[Figure, ...]) -> Section:
    words = (
        "Somebody has the weights, knows the scheme's family and parameters, and lacks the key. They look "
        "at the weights' distributions and spectra, and at the very place where the mark lives: how the "
        "wrong classes' scores respond, on average over inputs, along random directions of the family.",
        *found.notes,
    )
    return Section("With the weights at hand", words, figures=drawn)


def _black(found: Audit, drawn: tuple[Figure, ...]) -> Section:
    words = (
        "The API's owner sees the queries. These are the probes that the scheme really sends, for throwaway "
        "keys, beside other users' natural inputs. An AUC of .5 is blind, 1 or 0 tells every probe; "
        "one probe per carrier is scored, so that cases are independent.",
    )
    rows = [d for d in found.detectors if d.part == "queries"]
    scores = [d for d in rows if d.auc is not None]
    single = [d for d in rows if d.auc is None]
    tables = []
    if scores:
        cells = tuple(
            (d.name, _finding(d), f"{d.auc:.3f}", f"{d.low:.3f} to {d.high:.3f}", d.note) for d in scores
        )
        head = ("Detector", "Finding", "AUC", "95% interval", "How")
        tables.append(Table(head, cells, "DeLong's intervals.", _marks([d.striking for d in scores])))
    if single:
        cells = tuple((d.name, _finding(d), f"{d.model:.3f}", f"{d.control:.3f}", d.note) for d in single)
        head = ("Of the whole sequence", "Finding", "Probes", "Other users", "How")
        tables.append(Table(head, cells, "", _marks([d.striking for d in single])))
    return Section("From queries alone", words, tuple(tables), drawn)


def _harm(found: Audit) -> Section:
    words = (
        "Both models answer the same inputs, clean, attacked by projected gradient descent (20 steps, one "
        "start), and spoilt in common ways at three severities. Differences are resampled in pairs.",
        *remedies(found.worse),
    )
    drawn = (
        figures.harm(found.side_effects),
        figures.trust(found.curves["confidence"], found.curves["reliability"]),
    )
    return Section("Side effects", words, figures=drawn)


def _numbers(found: Audit) -> Section:
    tables = []
    gradients, weights = ([d for d in found.detectors if d.part == p] for p in ("gradients", "weights"))
    weights.sort(key=lambda d: (-d.striking, -abs(d.effect or 0) / d.tolerance))
    if gradients:
        tables.append(_compared(gradients, "Intervals are over inputs, or over keys where keys are strange."))
    if weights:
        more = f"The {_LISTED} that differ most, of {len(weights)}. " if len(weights) > _LISTED else ""
        tables.append(_compared(weights[:_LISTED], f"{more}Intervals are over weights."))
    classes = sorted((e for e in found.side_effects if e.kind == "class"), key=lambda e: e.difference)[:10]
    head = ("Measure", "Finding", "Model", "Control", "Difference", "95% interval")
    for rows, note in (
        ([e for e in found.side_effects if e.kind != "class"], "Shares that are right, unless a number."),
        (classes, "Classes, those that lost most first."),
    ):
        tables.append(Table(head, tuple(_cells(e) for e in rows), note, _marks([e.worse for e in rows])))
    return Section("All numbers", tables=tuple(tables))


def _compared(rows: Sequence[Detector], note: str) -> Table:
    cells = tuple(
        (
            d.name, _finding(d), f"{d.model:.3g}",
            f"{d.control:.3g}" + (f" ({d.low:.3g} to {d.high:.3g})" if d.z is not None else ""),
            f"{d.effect:+.2f} (±{d.tolerance:g})", "–" if d.z is None else f"{d.z:+.1f}",
        )
        for d in rows
    )  # fmt: skip
    note += " What stands out has an effect (mostly a log ratio) beyond the usual, and z beyond 4."
    head = ("Statistic", "Finding", "Model", "Control (95%)", "Effect (usual)", "z")
    return Table(head, cells, note, _marks([d.striking for d in rows]))


def _finding(d: Detector) -> str:
    return "stands out" if d.striking else "blind" if d.auc is not None else "as usual"


def _cells(e: Effect) -> tuple[str, ...]:
    if e.kind == "calibration":
        size = [f"{v:.4f}" for v in (e.model, e.control)] + [
            f"{e.difference:+.4f}",
            f"{e.low:+.4f} to {e.high:+.4f}",
        ]
    else:
        size = [f"{100 * v:.1f}%" for v in (e.model, e.control)]
        size += [f"{100 * e.difference:+.1f}", f"{100 * e.low:+.1f} to {100 * e.high:+.1f}"]
    return e.name, "worse" if e.worse else "no worse", *size


def _marks(flags: Sequence[bool]) -> tuple[RowMark, ...]:
    return tuple("bad" if flag else "plain" for flag in flags)
