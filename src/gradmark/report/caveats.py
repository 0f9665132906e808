"""What a verdict doesn't say, what would make it wrong, and how to repeat it."""

from __future__ import annotations

from gradmark.protocols import Verdict
from gradmark.report.model import Section, Table

LINEAR = "this p-value is valid only if the arrays were fixed before the suspect existed"


def limits(verdict: Verdict, suspect_name: str, linear: bool) -> Section:
    committed = (
        "The arrays come from other software, and nothing in them shows when they were made. Whoever has the "
        f"model can compute arrays that fit it. Therefore {LINEAR}, and this has to be shown by other means."
        if linear
        else "The key and the mark must have been committed to before the suspect existed: anyone can look "
        "for a key that fits a model that is already there. The mark's file holds such a commitment; a dated "
        "publication or time stamp of it shows that it is old enough."
    )
    n = verdict.keys_tried
    stated = "the one key that was stated as tried" if n == 1 else f"the {n} keys stated as tried"
    texts = [
        "A p-value is not a probability of guilt. It says how often chance alone would do this well, and not "
        "how likely it is that somebody copied the model. It rests on one assumption: that the secret was "
        "drawn at random and had no part in the making of the suspect, if the suspect is innocent.",
        committed,
        f"Trying many keys on one model finds a match sooner or later. p is corrected for {stated}; "
        "tries that weren't stated aren't counted.",
        "The test does not say who copied a model, when, how, or with what right; only whether the mark is "
        "in it.",
    ]
    if verdict.outcome != "owned":
        texts.append(
            f"That no mark was found doesn't show that {suspect_name} is independent: a mark can be damaged "
            "by changes to a model, and more queries or access to the model itself may find what this test "
            "missed."
        )
    return Section("What this does not say", tuple(texts))


def wrong(verdict: Verdict, linear: bool) -> Section:
    rows = [
        (
            "The secret isn't secret or is too young",
            "It was known to, or made by, somebody who had the suspect.",
        ),
        ("More was tried than stated", "Keys, marks, data or settings were varied until the result pleased."),
        (
            "Another model answered",
            "The file or address tested isn't the one in dispute: compare the fingerprint.",
        ),
        ("Another mark was tested", "Compare the mark's fingerprint with the one that was published."),
    ]
    if verdict.test != "betting":
        rows.append(
            (
                "The number of queries was changed",
                "Testing went on until the result pleased instead of to a fixed end.",
            )
        )
    if linear:
        rows.insert(
            0, ("The arrays were made to fit", "They were computed from the suspect, or after it existed.")
        )
    if verdict.access == "black":
        rows.append(
            (
                "The service tampered with its answers",
                "That can hide a mark, but not fake one without the secret.",
            )
        )
    return Section("What would make it wrong", tables=(Table(("If", "That is"), tuple(rows)),))


def reproduce(verdict: Verdict, linear: bool) -> Section:
    mark = "--linear-mark MARK.npz" if linear else "--key OWNER.key --mark mark.json"
    queries = f" --queries {verdict.queries_allowed or verdict.queries}" if verdict.access == "black" else ""
    queries += "" if verdict.modified is None else " --seal model.seal"
    queries += " --sequential" if verdict.test == "betting" else ""
    settings = f"--access {verdict.access}{queries} --alpha {verdict.alpha:g} --report again.html"
    texts = [
        f"Install gradmark {verdict.version}, put the real files in place of the capital letters, and run "
        "the command below. The outcome and log10 p must be the same, up to rounding where another processor "
        "computes."
    ]
    if verdict.keys_tried > 1:
        texts.append(f"The p-value in this report is {verdict.keys_tried} times that of the one key alone.")
    if not linear:
        texts.append(
            "The key is a secret: its owner runs the command before witnesses, or shows the key to a neutral "
            "expert. The SHA-256 of mark.json must be the mark's fingerprint above."
        )
    command = f"gradmark verify SUSPECT {mark} --data DATA \\\n    {settings}"
    return Section("How to reproduce this", tuple(texts), code=(command,))
