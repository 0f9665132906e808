"""The report of one check against a seal, for readers who weren't there. Holds no probe and no weight."""

from __future__ import annotations

from gradmark.report.model import Report, Section, Table, Tone
from gradmark.report.words import PROGRAM, duration, versions
from gradmark.seal import Checked, SealOutcome

_TONES: dict[SealOutcome, tuple[Tone, str]] = {
    "intact": ("owned", "Intact"),
    "modified": ("none", "Modified"),
    "other": ("none", "Another model"),
    "inconclusive": ("inconclusive", "Inconclusive"),
}
_ROWS = 40


def check_report(found: Checked, suspect_name: str) -> Report:
    """What was asked, the answer, how it was checked, the numbers, their limits, and how to repeat it."""
    tone, label = _TONES[found.outcome]
    return Report(
        title=f"Was {suspect_name} changed?",
        question=f"Is {suspect_name} the model that {found.owner} sealed, unchanged?",
        answer=answer(found, suspect_name),
        tone=tone,
        sections=(
            _how(found),
            _numbers(found),
            *_tensors(found),
            _limits(found),
            _wrong(found),
            _reproduce(found),
        ),
        footer=versions(found.version),
        label=label,
    )


def answer(found: Checked, name: str) -> str:
    """The outcome in one or two sentences."""
    if found.outcome == "intact":
        seen = "its weights are, bit for bit," if found.access == "white" else "its answers are"
        told = f"Yes: {seen} those of the sealed model ({found.reason})."
        return f"{told} {PROGRAM}" if found.own_program else told
    if found.outcome == "modified":
        told = f" {strength(found)}" if found.strength is not None else ""
        return f"No: {name} differs from the sealed model ({found.reason}).{told}"
    if found.outcome == "other":
        return f"No: {name} is another model, or the sealed one changed beyond recognition ({found.reason})."
    return f"That could not be told: {found.reason}."


def strength(found: Checked) -> str:
    """How strongly it was changed, in a sentence."""
    value = f"{100 * (found.strength or 0.0):.2g} %"
    if found.access == "white" and found.tensors:
        return f"All its weights together moved by about {value} of their size."
    return f"Its answers moved as far as noise of {value} on every weight would move them."


def _how(found: Checked) -> Section:
    texts = [
        "A seal was made of the model when it was whole. It is signed by a key of its owner, and holds a "
        "fingerprint of every tensor of weights and a number of probes: inputs at which the model's best "
        "classes are all but tied, so that small changes of its weights show in its answers."
    ]
    if found.tensors is not None:
        texts.append(f"The suspect's weights were at hand: {found.n_tensors} fingerprints were compared.")
    if found.form is not None:
        rounding = "" if found.decimals is None else f", to {found.decimals} decimals"
        texts.append(
            f"The suspect was asked {found.queries} single inputs. It answered with {found.form}{rounding}."
        )
    return Section("How it was checked", tuple(texts))


def _numbers(found: Checked) -> Section:
    def row(name: str, value: float | None, meaning: str) -> tuple[tuple[str, str, str], ...]:
        return () if value is None else ((name, f"{value:.3g}", meaning),)

    asked, differ = f"{found.off} of {found.probes}", f"{len(found.tensors or ())} of {found.n_tensors}"
    rows = (
        *((("Probes off", asked, "Answers that the sealed model doesn't give."),) if found.probes else ()),
        *((("Tensors that differ", differ, "By their fingerprints."),) if found.tensors is not None else ()),
        *row("Strength", found.strength, "Of the change, as relative noise on the weights."),
        *row("Similarity", found.similarity, "Of ordinary answers: 1 equal, 0 strangers."),
        *row("Detection limit", found.limit, "Relative noise on any one tensor that would show."),
        ("Time", duration(found.seconds), "What the check took."),
        ("Seal", found.seal, "SHA-256 of the seal's file."),
        ("Signer", found.signer, "The public key of the seal's signature: compare it with the owner's."),
        ("Suspect", found.suspect, "SHA-256 of the suspect's file or address."),
    )
    return Section("The numbers", tables=(Table(("Number", "Value", "Meaning"), rows),))


def _tensors(found: Checked) -> tuple[Section, ...]:
    if not found.tensors:
        return ()
    rows = tuple(tensor_row(found, i) for i in range(min(_ROWS, len(found.tensors))))
    rest = len(found.tensors) - len(rows)
    note = f"{rest} more differ." if rest else ""
    return (Section("Tensors that differ", tables=(Table(TENSOR_HEAD, rows, note=note),)),)


TENSOR_HEAD = ("Tensor", "What", "Relative change (L2)", "Largest change", "Entries changed")


def tensor_row(found: Checked, i: int) -> tuple[str, ...]:
    """One row of the table of tensors that differ."""
    c = (found.tensors or ())[i]
    if c.relative_l2 is None or c.max_abs is None:
        return (c.name, f"{c.kind} {c.found}".strip(), "", "", f"of {c.entries}")
    what = f"{c.kind} {c.found}".strip()
    return (c.name, what, f"{c.relative_l2:.2g}", f"{c.max_abs:.2g}", f"about {c.changed} of {c.entries}")


def _limits(found: Checked) -> Section:
    texts = [
        "A seal says nothing of who owns a model, or who changed it. The signature shows that the seal "
        "itself wasn't altered; whose key signed it has to be known from elsewhere.",
    ]
    if found.tensors is None:
        texts.append(
            "Answers can only show changes that reach them: one far below the detection limit, or in a part "
            "of the model that no probe touches, stays unseen. Whoever has the seal's probes can train a "
            "changed model until it answers them as the sealed one; the seal must have been kept private."
        )
    return Section("What this does not say", tuple(texts))


def _wrong(found: Checked) -> Section:
    rows = [
        ("The seal is another's", "Somebody else sealed another model: compare the signer with the owner's."),
        ("The seal is too young", "It was made of a model that had been changed already."),
        (
            "Another model was checked",
            "The file or address isn't the one in dispute: compare the fingerprint.",
        ),
    ]
    if found.tensors is None:
        rows.append(
            ("The probes are known", "Whoever had the seal could train or filter until they are answered.")
        )
        rows.append(
            ("The arithmetic is another", "TF32, bf16 or an int8 runtime answers as a changed model would.")
        )
    return Section("What would make it wrong", tables=(Table(("If", "That is"), tuple(rows)),))


def _reproduce(found: Checked) -> Section:
    command = f"gradmark check SUSPECT --seal model.seal --access {found.access} --report again.html"
    return Section("How to reproduce this", (f"Install gradmark {found.version} and run:",), code=(command,))


__all__ = ["TENSOR_HEAD", "answer", "check_report", "strength", "tensor_row"]
