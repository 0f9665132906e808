"""Claims: signed, dated, opened; and the three classic frauds refused."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from authority import Authority, running
from commandline import gradmark, refused
from conformance import CARRIERS, KEY, SPECS, mark_file, network, pool, trained, white
from gradmark import catalog
from gradmark.claim import (
    ALPHA,
    Check,
    Claim,
    ClaimFile,
    Opening,
    Rule,
    check_claim,
    least_alpha,
    pool_digest,
    search,
)
from gradmark.claim.file import PAYLOAD_TYPE
from gradmark.claim.timestamp import load_certificates, read_stamp, request_stamp
from gradmark.codec import MarkFile
from gradmark.dsse import Envelope, pae
from gradmark.errors import ClaimError, MismatchError, PassphraseError, TimestampError, UsageError
from gradmark.files import canonical_json, sha256
from gradmark.keys import OwnerKey
from gradmark.stats import fisher
from gradmark.suspects import save_weights
from gradmark.tails import log10_tail_binomial
from gradmark.verify import verify

DOMAIN = "grey"
SPEC = SPECS[DOMAIN]
MARK = mark_file("ensemble", DOMAIN)
WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
FILE = ClaimFile.sign(KEY, Claim.create(KEY, MARK, made=WHEN))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    with running(tmp_path_factory.mktemp("authority")) as found:
        yield found


def failed(checks: tuple[Check, ...]) -> set[str]:
    return {check.name for check in checks if check.ok is False}


# --- the statement ----------------------------------------------------------------------------------------


def test_a_claim_survives_its_file_and_holds_no_secret() -> None:
    again = ClaimFile.from_bytes(FILE.to_bytes())
    assert again == FILE
    assert again.claim.mark == MARK
    assert again.claim.made == "2026-01-02T03:04:05Z"
    for purpose in ("claim-signature", "commitment", "key-id"):
        secret = KEY.derive(purpose, 32)
        for text in (secret.hex(), base64.b64encode(secret).decode()):
            assert text not in FILE.to_bytes().decode()


def test_the_envelope_is_plain_dsse_over_an_in_toto_statement() -> None:
    """Checked with nothing but the standards: RFC 8032, DSSE's encoding, in-toto's fields."""
    body = json.loads(FILE.to_bytes())
    payload = base64.b64decode(body["payload"])
    signed = b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(body["signatures"][0]["keyid"]))
    public.verify(base64.b64decode(body["signatures"][0]["sig"]), signed)
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"][0]["digest"]["sha256"] == MARK.digest.removeprefix("sha256:")
    assert pae(PAYLOAD_TYPE, payload) == signed
    seed = KEY.derive("claim-signature", 32)
    assert FILE.envelope.signature == Ed25519PrivateKey.from_private_bytes(seed).sign(signed)


def test_every_changed_byte_is_noticed() -> None:
    """One byte of the payload changed: it can't be read, or the signature fails."""
    payload = FILE.envelope.payload
    caught = 0
    for place in range(0, len(payload), 37):
        for byte in (payload[place] ^ 1, ord("0")):
            changed = payload[:place] + bytes([byte]) + payload[place + 1 :]
            if changed == payload:
                continue
            body = FILE.envelope.to_json() | {"payload": base64.b64encode(changed).decode(), "timestamps": []}
            try:
                found = ClaimFile.from_bytes(canonical_json(body))
            except ClaimError:
                caught += 1
                continue
            assert failed(check_claim(found).checks) == {"signature"}
    assert caught > 20


def rewritten(
    change: dict[str, Any], place: tuple[str, ...] = ("predicate",), key: OwnerKey = KEY
) -> ClaimFile:
    """The claim with fields changed, and signed anew by the forger."""
    body = json.loads(FILE.envelope.payload)
    inner = body
    for name in place:
        inner = inner[name]
    inner |= change
    envelope = Envelope.sign(key, "claim-signature", PAYLOAD_TYPE, canonical_json(body))
    return ClaimFile.from_bytes(canonical_json({**envelope.to_json(), "timestamps": []}))


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ({"probes": [[0.1, 0.2]]}, ("predicate",), "no place for anything else"),
        ({"triggers": "AAAA"}, ("predicate", "rule"), "no place for anything else"),
        ({"inputs": []}, (), "no place for anything else"),
        ({"bits": [1]}, ("predicate", "mark"), "mark can't be read"),
        ({"owner": "Evil\u202eName"}, ("predicate",), "owner"),
        ({"made": "yesterday"}, ("predicate",), "made"),
        ({"alpha": 1}, ("predicate", "rule"), "alpha"),
        ({"alpha": float("-0.5")}, ("predicate", "rule"), "alpha"),
        ({"queries": True}, ("predicate", "rule"), "queries"),
        ({"pool": {"name": "d", "digest": "x", "inputs": 1}}, ("predicate", "rule"), "pool"),
        ({"subject": []}, (), "subject"),
        ({"subject": [{"name": "mark.json", "digest": {"sha256": "0" * 64}}]}, (), "fit each other"),
        ({"predicateType": "urn:gradmark:claim:2"}, (), "predicateType"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(change: dict[str, Any], place: tuple[str, ...], words: str) -> None:
    with pytest.raises(ClaimError, match=words):
        rewritten(change, place)


def test_another_spelling_is_refused() -> None:
    spaced = json.dumps(json.loads(FILE.envelope.payload), indent=1).encode()
    infinite = FILE.envelope.payload.replace(b'"alpha":1e-25', b'"alpha":1e999')
    for payload, words in ((spaced, "fit each other"), (infinite, "alpha")):
        envelope = Envelope.sign(KEY, "claim-signature", PAYLOAD_TYPE, payload)
        with pytest.raises(ClaimError, match=words):
            ClaimFile.from_bytes(canonical_json({**envelope.to_json(), "timestamps": []}))


# --- what is bound ----------------------------------------------------------------------------------------


def test_owner_commitment_and_key_are_bound() -> None:
    assert not failed(check_claim(FILE, key=KEY, mark=MARK).checks)
    other = OwnerKey.from_seed(2, "Owner")
    assert failed(check_claim(FILE, key=other).checks) == {"key"}
    renamed = rewritten({"owner": "Somebody Else"}, key=KEY)
    assert failed(check_claim(renamed, key=KEY).checks) == {"key"}
    resigned = rewritten({}, key=other)
    assert failed(check_claim(resigned, key=KEY).checks) == {"key"}
    assert failed(check_claim(FILE, mark=mark_file("trigger", DOMAIN)).checks) == {"mark"}
    with pytest.raises(MismatchError, match="doesn't belong"):
        Claim.create(other, MARK)


def test_a_mark_that_can_never_reach_the_threshold_is_not_claimed() -> None:
    weak = mark_file("trigger", DOMAIN)  # 64 bits
    assert least_alpha(KEY, weak) == pytest.approx(-64 * np.log10(2))
    with pytest.raises(UsageError, match="more bits"):
        Claim.create(KEY, weak)
    with pytest.raises(UsageError, match="1e-25"):
        Claim.create(KEY, MARK, alpha=1e-6)


def test_a_pools_digest_sees_order_labels_and_values() -> None:
    x, labels = pool(DOMAIN)
    digest = pool_digest((x, labels))
    assert digest == pool_digest((x.clone(), labels.clone()))
    moved = x.clone()
    moved[3, 0, 2, 2] += 1e-3
    relabelled = labels.clone()
    relabelled[7] = (relabelled[7] + 1) % 10
    for other in ((x.flip(0), labels.flip(0)), (moved, labels), (x, relabelled), (x[:-1], labels[:-1])):
        assert pool_digest(other) != digest


# --- time -------------------------------------------------------------------------------------------------


def test_a_real_authority_dates_a_claim_and_the_check_is_offline(authority: Authority) -> None:
    stamped = FILE.with_stamp(request_stamp(authority.url, FILE.stamped))
    again = ClaimFile.from_bytes(stamped.to_bytes())
    assert again.digest == FILE.digest
    found = check_claim(again, trusted=load_certificates(authority.ca))
    assert found.valid
    assert found.attested is not None
    assert abs(found.attested - datetime.now(UTC)) < timedelta(minutes=5)
    assert found.stamps[0].authority == "CN=Test authority"
    unknown = check_claim(again)
    assert unknown.valid
    assert unknown.attested is None
    assert "--tsa-certificates" in unknown.checks[-1].found


def test_foreign_and_moved_stamps_are_refused(authority: Authority, tmp_path: Path) -> None:
    other = ClaimFile.sign(KEY, Claim.create(KEY, MARK, made=WHEN + timedelta(days=1)))
    moved = other.with_stamp(request_stamp(authority.url, FILE.stamped))
    assert failed(check_claim(moved).checks) == {"time"}
    assert failed(check_claim(moved, trusted=load_certificates(authority.ca)).checks) == {"time"}
    with running(tmp_path / "other", "Test authority") as impostor:
        forged = FILE.with_stamp(request_stamp(impostor.url, FILE.stamped))
    found = check_claim(forged, trusted=load_certificates(authority.ca))
    assert failed(found.checks) == {"time"}
    assert found.attested is None
    junk = check_claim(FILE.with_stamp(b"not a stamp"))
    assert failed(junk.checks) == {"time"}


def test_what_is_added_to_a_good_stamp_changes_nothing(authority: Authority, tmp_path: Path) -> None:
    """Stamps lie outside of the signature, so anybody can add some to a copy."""
    trusted = load_certificates(authority.ca)
    good = request_stamp(authority.url, FILE.stamped)
    with running(tmp_path / "other", "Another authority") as unknown:
        foreign = request_stamp(unknown.url, FILE.stamped)
    for more in (b"junk", foreign):
        found = check_claim(FILE.with_stamp(good).with_stamp(more), trusted=trusted)
        assert found.valid
        assert found.attested is not None
    time.sleep(1.1)  # stamps are whole seconds
    later = ClaimFile.sign(KEY, Claim.create(KEY, MARK, made=WHEN + timedelta(days=1)))
    later = later.with_stamp(request_stamp(authority.url, later.stamped))
    earlier = FILE.with_stamp(good).with_stamp(b"junk")
    assert failed(check_claim(later, trusted=trusted, against=earlier).checks) == {"earlier"}


def test_whose_signature_it_is_is_shown() -> None:
    """Anybody can sign under Acme's name over Acme's public mark: the signer tells them apart."""
    forger = OwnerKey.from_seed(77, KEY.owner)
    forged = rewritten({}, key=forger)
    found = check_claim(forged)
    assert found.valid
    assert found.to_json()["signer"] == forged.signer != FILE.signer
    assert forged.signer in found.checks[0].found


def test_an_authority_that_lies_is_noticed_at_once(authority: Authority) -> None:
    old = request_stamp(authority.url, FILE.stamped)
    for answer, words in ((old, "something else"), (b"", "can't be read"), (b"x" * (2 << 20), "too big")):
        authority.answers = [answer]
        with pytest.raises(TimestampError, match=words):
            request_stamp(authority.url, FILE.stamped)
    with pytest.raises(TimestampError, match="can't be reached"):
        request_stamp("http://127.0.0.1:9/", FILE.stamped)


def test_a_damaged_stamp_never_changes_its_time(authority: Authority) -> None:
    """Whatever byte is damaged: refused, untrusted, or of the same time."""
    stamp, trusted = request_stamp(authority.url, FILE.stamped), load_certificates(authority.ca)
    time, generator = read_stamp(stamp, FILE.stamped).time, np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(stamp)
        damaged[generator.integers(len(stamp))] ^= 1 << int(generator.integers(8))
        try:
            found = read_stamp(bytes(damaged), FILE.stamped, trusted)
        except TimestampError:
            outcomes.add("refused")
            continue
        outcomes.add(found.trusted)
        assert not (found.trusted and found.fits) or found.time == time
    assert {"refused", False} <= outcomes


# --- disclosure -------------------------------------------------------------------------------------------


def test_an_opening_needs_its_passphrase_and_the_right_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradmark.keyfile.SCRYPT_LOG2_N", 4)
    opening = Opening.of(FILE, KEY)
    sealed = opening.to_bytes("for the judge")
    assert Opening.from_bytes(sealed, "for the judge").key == KEY
    assert "OwnerKey" not in repr(opening)
    with pytest.raises(PassphraseError):
        Opening.from_bytes(sealed, "wrong")
    with pytest.raises(PassphraseError):
        Opening.from_bytes(sealed)
    with pytest.raises(MismatchError):
        Opening.of(FILE, OwnerKey.from_seed(2, "Owner"))
    resigned = rewritten({}, key=OwnerKey.from_seed(2, "Owner"))
    with pytest.raises(MismatchError, match="signed with another key"):
        Opening.of(resigned, KEY)


# --- the three classic frauds -----------------------------------------------------------------------------


def test_fraud_a_key_searched_for_after_the_fact() -> None:
    """2**9 keys tried on somebody's network find about 2**-9, as they must, and 2**60 will find 1e-18.

    An ordinary threshold falls to a search that is long enough; a claim's is beyond one of 2**60 keys.
    """
    victim = white(trained("ensemble", DOMAIN))
    values, tries = [], 1 << 9
    scheme = catalog.scheme("trigger")
    for seed in range(tries):
        key = OwnerKey.from_seed(10**6 + seed, "Forger")
        mark = scheme.mark(key, SPEC)
        if seed == 0:
            inputs = mark.inputs
            scores = victim.query(inputs)
        both = scores.gather(1, mark.pairs).double()  # a cheap search: the bits change, the inputs don't
        values.append(int(((both[:, 0] - both[:, 1]) * mark.bits > 0).sum()))
    best = log10_tail_binomial(64, max(values))
    assert -np.log10(tries) - 2 < best < -np.log10(tries) + 1.5
    assert ALPHA * 2.0**60 < 1e-6
    forger = OwnerKey.from_seed(10**6 + int(np.argmax(values)), "Forger")
    own = MarkFile.create(forger, "ensemble", MARK.scheme_parameters, SPEC, "signed-rank", CARRIERS)
    claim = ClaimFile.sign(forger, Claim.create(forger, own))
    verdict = verify(own, forger, victim, pool(DOMAIN), alpha=claim.claim.rule.alpha)
    assert verdict.outcome == "no-evidence"
    greedy = rewritten({"alpha": 1e-3}, ("predicate", "rule"))
    assert failed(check_claim(greedy).checks) == {"threshold"}


def test_fraud_a_stolen_model_claimed_again_later(authority: Authority) -> None:
    """The thief puts his own mark into the stolen model and claims it: a valid claim, but the later one."""
    trusted = load_certificates(authority.ca)
    mine = FILE.with_stamp(request_stamp(authority.url, FILE.stamped))
    thief = OwnerKey.from_seed(3, "Thief")
    mark = mark_file("ensemble", DOMAIN, thief)
    time.sleep(1.1)  # stamps are whole seconds
    his = ClaimFile.sign(thief, Claim.create(thief, mark, made=WHEN - timedelta(days=365)))
    his = his.with_stamp(request_stamp(authority.url, his.stamped))
    assert check_claim(his, trusted=trusted).valid
    assert failed(check_claim(his, trusted=trusted, against=mine).checks) == {"earlier"}
    assert check_claim(mine, trusted=trusted, against=his).valid
    # Without a stamp, whatever date the claim itself tells: no claim is earlier.
    undated = replace(his, stamps=())
    assert failed(check_claim(undated, trusted=trusted, against=mine).checks) == {"earlier"}
    assert failed(check_claim(FILE, trusted=trusted, against=undated).checks) == {"earlier"}
    assert failed(check_claim(mine, trusted=trusted, against=mine).checks) == {"earlier"}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an honest claim, its opening, data, the marked model and an innocent one, as files."""
    folder = tmp_path_factory.mktemp("case")
    x, labels = pool(DOMAIN)
    np.savez(folder / "pool.npz", x=(x[:, 0] * 255).round().to(torch.uint8).numpy(), y=labels.numpy())
    KEY.save(folder / "owner.key", None)
    MARK.save(folder / "mark.json")
    save_weights(trained("ensemble", DOMAIN), folder / "marked.safetensors")
    save_weights(trained("ensemble", DOMAIN, marked=False), folder / "innocent.safetensors")
    made = gradmark(
        "claim", "--mark", folder / "mark.json", "--key", folder / "owner.key",
        "--out", folder / "claim.json", "--model", folder / "marked.safetensors",
        "--data", folder / "pool.npz", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    assert made.json()["alpha"] == ALPHA
    opened = gradmark("claim", "--disclose", folder / "claim.json", "--key", folder / "owner.key",
                      "--out", folder / "opening.json", "--no-passphrase")  # fmt: skip
    assert opened.code == 0, opened.err
    return folder


def judge(case: Path, suspect: str, *more: object, **files: Path) -> Any:
    given = {
        "claim": case / "claim.json",
        "opening": case / "opening.json",
        "data": case / "pool.npz",
        **files,
    }
    options = [part for name, path in given.items() for part in (f"--{name}", path)]
    return gradmark("judge", case / suspect, *options, "--model", "test_claim:grey", *more)


def grey() -> torch.nn.Module:
    return network(DOMAIN)


def test_the_judge_needs_the_opening_alone(case: Path) -> None:
    found = judge(case, "marked.safetensors", "--innocent", case / "innocent.safetensors", "--json",
                  "--report", case / "ruling.html")  # fmt: skip
    assert found.code == 0, found.err
    body = found.json()
    assert (body["outcome"], body["pool"], body["claim"]["valid"]) == ("owned", "claimed", True)
    x, labels = pool(DOMAIN)
    direct = verify(MARK, KEY, white(trained("ensemble", DOMAIN)), (x, labels))
    assert body["verdict"]["log10_p"] == pytest.approx(direct.log10_p, abs=0.5)
    assert body["innocents"][0]["log10_p"] > -4
    page = (case / "ruling.html").read_text()
    assert "The claim behind it" in page
    assert "vouches" not in page
    secret = json.loads((case / "opening.json").read_text())["key"]["secret"]
    assert secret not in page + found.out
    assert "Proven" in page
    assert "--innocent INNOCENT" in page
    accused = judge(case, "innocent.safetensors", "--innocent", case / "marked.safetensors", "--json",
                    "--report", case / "refused.html")  # fmt: skip
    assert (accused.code, accused.json()["outcome"]) == (1, "refused")
    assert "The same test accuses" in (case / "refused.html").read_text()
    none = judge(case, "innocent.safetensors", "--json")
    assert (none.code, none.json()["outcome"]) == (1, "no-evidence")


def test_fraud_probes_chosen_adversarially(case: Path, tmp_path: Path) -> None:
    """Inputs made so that an innocent network agrees with the bits: they have no place in the claim.

    With a pool of his own choice the forger gets an absurd p-value from a network that he never touched.
    The claim fixed other inputs, so the judge refuses these; and a claim that fixed
    such inputs from the start is given away by any innocent network, which they accuse as well.
    """
    adversarial = tmp_path / "adversarial.npz"
    _adversarial_pool(adversarial, trained("ensemble", DOMAIN, marked=False))
    fooled = gradmark("verify", case / "innocent.safetensors", "--key", case / "owner.key", "--mark",
                      case / "mark.json", "--data", adversarial, "--model", "test_claim:grey",
                      "--json")  # fmt: skip
    assert fooled.json()["outcome"] == "owned"
    assert fooled.json()["log10_p"] < -20
    refused(judge(case, "innocent.safetensors", data=adversarial), "aren't the inputs that the claim fixed")
    planned = tmp_path / "claim.json"
    for arguments in (
        ("--mark", case / "mark.json", "--data", adversarial, "--out", planned),
        ("--disclose", planned, "--no-passphrase", "--out", tmp_path / "opening.json"),
    ):
        assert gradmark("claim", "--key", case / "owner.key", *arguments).code == 0
    ruling = judge(case, "innocent.safetensors", "--innocent", case / "innocent.safetensors", "--json",
                   claim=planned, opening=tmp_path / "opening.json", data=adversarial)  # fmt: skip
    assert ruling.code == 1
    assert ruling.json()["outcome"] == "refused"
    assert "innocent.safetensors" in ruling.json()["reason"]


def _adversarial_pool(path: Path, model: torch.nn.Module) -> None:
    """The pool's inputs moved by gradient steps until ``model`` agrees with the class contrasts' bits."""
    mark: Any = catalog.scheme("ensemble", MARK.scheme_parameters).mark(KEY, SPEC).parts[1]  # type: ignore[attr-defined]
    x, labels = (part.clone() for part in pool(DOMAIN))
    index = mark.index(labels)
    signs = mark.bits[index.clamp_max(len(mark.bits) - 1)] * (index < len(mark.bits))
    for _ in range(60):
        x.requires_grad_()
        values = torch.einsum("bc,blc->bl", model(x), mark.contrasts[labels]) * signs
        (slope,) = torch.autograd.grad(values.clamp_max(1.0).sum(), x)
        x = (x.detach() + 0.05 * slope.sign()).clamp(0, 1)
    np.savez(path, x=(x[:, 0] * 255).round().to(torch.uint8).numpy(), y=labels.numpy())


def test_the_judge_refuses_what_doesnt_belong_together(case: Path, tmp_path: Path) -> None:
    assert gradmark("claim", "--mark", case / "mark.json", "--key", case / "owner.key",
                    "--out", tmp_path / "open.json").code == 0  # fmt: skip
    refused(judge(case, "marked.safetensors", claim=tmp_path / "open.json"), "opening is of another claim")
    assert gradmark("claim", "--disclose", tmp_path / "open.json", "--key", case / "owner.key",
                    "--out", tmp_path / "opening.json", "--no-passphrase").code == 0  # fmt: skip
    open_case = {"claim": tmp_path / "open.json", "opening": tmp_path / "opening.json"}
    refused(judge(case, "marked.safetensors", **open_case), "--own-data")
    own = judge(case, "marked.safetensors", "--own-data", "--json", **open_case)
    assert (own.code, own.json()["pool"]) == (0, "own")
    body = json.loads((case / "claim.json").read_text())
    body["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    (tmp_path / "forged.json").write_text(json.dumps(body))
    refused(judge(case, "marked.safetensors", claim=tmp_path / "forged.json"), "opening is of another claim")


# --- the command line -------------------------------------------------------------------------------------


def test_claim_check_on_the_command_line(case: Path, authority: Authority, tmp_path: Path) -> None:
    claim, dated = case / "claim.json", tmp_path / "dated.json"
    plain = gradmark("claim", "--check", claim, "--json")
    assert (plain.code, plain.json()["valid"], plain.json()["attested"]) == (0, True, None)
    stamped = gradmark("claim", "--stamp", claim, "--timestamp", authority.url, "--out", dated, "--json")
    assert stamped.code == 0, stamped.err
    whole = gradmark("claim", "--check", dated, "--tsa-certificates", authority.ca,
                     "--key", case / "owner.key", "--mark", case / "mark.json",
                     "--model", case / "marked.safetensors")  # fmt: skip
    assert whole.code == 0, whole.out
    assert "VALID" in whole.out
    assert "It existed on" in whole.out
    wrong = gradmark("claim", "--check", dated, "--model", case / "innocent.safetensors")
    assert wrong.code == 1
    assert "INVALID" in wrong.out
    refused(gradmark("claim", "--check", tmp_path / "missing.json"), "can't be opened")
    refused(gradmark("claim", "--check", case / "mark.json"), "no envelope")
    refused(gradmark("claim", "--check", claim, "--tsa-certificates", claim), "certificates can't be read")


def test_nothing_is_left_where_no_authority_answers(case: Path, tmp_path: Path) -> None:
    out = tmp_path / "claim.json"
    made = gradmark("claim", "--mark", case / "mark.json", "--key", case / "owner.key", "--out", out,
                    "--timestamp", "http://127.0.0.1:9/")  # fmt: skip
    refused(made, "can't be reached")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--mark"),
        (("--check", "a", "--stamp", "b"), "One thing at a time"),
        (("--check", "a", "--out", "b"), "no use for --out"),
        (("--disclose", "a"), "no --key"),
        (("--mark", "a", "--key", "b", "--out", "c", "--against", "d"), "no use for --against"),
    ],
)
def test_options_that_make_no_sense_together(arguments: tuple[str, ...], words: str) -> None:
    refused(gradmark("claim", *arguments), words)


def test_digests_are_what_sha256sum_says(case: Path) -> None:
    found = gradmark("claim", "--check", case / "claim.json", "--json").json()
    assert found["model"] == sha256((case / "marked.safetensors").read_bytes())
    assert found["mark"] == sha256((case / "mark.json").read_bytes())


# --- a mark whose parts can be searched for one by one -----------------------------------------------------


def test_a_forger_who_searches_part_by_part_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of them, with a thousand tries for each of three parts, of which they take what suits."""
    tries, forgers, generator = 1000, 20_000, np.random.default_rng(0)
    monkeypatch.setattr(search, "TRIES", np.log10(tries))
    best = np.log10(1 - (1 - generator.random((forgers, 3))) ** (1 / tries))  # the least of so many p-values
    fooled = [min(fisher(list(row[:n])) for n in (1, 2, 3)) for row in best]
    corrected = [min(search.combined(list(row[:n])) for n in (1, 2, 3)) for row in best]
    for alpha in (1e-4, 1e-5):
        assert np.mean(np.array(corrected) <= np.log10(tries * alpha)) <= tries * alpha
    assert np.mean(np.array(fooled) <= -5) > 20 * tries * 1e-5, "Fisher's product by itself is fooled"


def test_a_mark_of_one_part_is_judged_as_it_was() -> None:
    assert search.combined([-40.0]) == pytest.approx(-40.0 + (60 + 9) * np.log10(2))
    assert search.combined([-18.0, -15.0]) == 0.0
    assert not search.searchable(MARK)
    assert not search.searchable(mark_file("filter-gradient", DOMAIN))


def test_an_older_mark_has_to_stand_a_search_of_each_part(tmp_path: Path) -> None:
    """Its parts have bits of their own: what proves a joint mark is too little for it."""
    golden = Path(__file__).parent / "golden"
    key, mark = OwnerKey.load(golden / "key-v1.json"), MarkFile.load(golden / "mark-ensemble-v1.json")
    assert search.searchable(mark)
    with pytest.raises(UsageError, match="No claim can rest on that"):
        Claim.create(key, mark)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    file = ClaimFile.sign(key, Claim(key.owner, key.key_id, mark, Rule(), None, now))
    file.save(tmp_path / "claim.json")
    Opening.of(file, key).save(tmp_path / "opening.json", None)
    ruling = gradmark(
        "judge", golden / "golden-ensemble-v1.safetensors", "--claim", tmp_path / "claim.json", "--opening",
        tmp_path / "opening.json", "--data", "digits", "--own-data", "--model", "test_golden:net", "--json",
    )  # fmt: skip
    assert ruling.json()["outcome"] == "inconclusive", ruling.err
    found = ruling.json()["verdict"]
    assert "search for each part" in found["reason"]
    assert found["outcome"] == "inconclusive"
