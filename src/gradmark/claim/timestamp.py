"""RFC 3161 time stamps: a trusted third party's word that some bytes existed at a time.

Needs the packages ``rfc3161-client`` (and ``httpx2`` to ask an authority): ``pip install 'gradmark[claim]'``.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gradmark.errors import TimestampError, UsageError
from gradmark.files import read_limited

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

_LIMIT = 1 << 20
_SHA512 = "2.16.840.1.101.3.4.2.3"


@dataclass(frozen=True)
class Stamp:
    """What a time stamp says. ``time``: UTC. ``authority``: the signer as its certificate names it.

    ``fits``: it is of these very bytes. ``trusted``: its signature leads to a given certificate; None where
    none was given. ``reason``: why it isn't, in a few words.
    """

    time: datetime
    authority: str
    fits: bool
    trusted: bool | None
    reason: str = ""


def client() -> ModuleType:
    """The package rfc3161_client, or UsageError that says how to get it."""
    try:
        import rfc3161_client
    except ImportError as cause:
        raise UsageError(
            "Time stamps need rfc3161-client", found="no such package", fix="pip install 'gradmark[claim]'"
        ) from cause
    return rfc3161_client


def request_stamp(url: str, message: bytes, *, timeout: float = 30.0) -> bytes:
    """A time stamp of ``message`` from the authority at ``url``: its response, DER, checked to be of it.

    SHA-512 of the message and a random nonce are sent, nothing else. Raises TimestampError.
    """
    rfc = client()
    wanted = rfc.TimestampRequestBuilder().data(message).nonce(nonce=True).cert_request(cert_request=True)
    request = wanted.build()
    answer = _post(url, request.as_bytes(), timeout)
    fits, response = _said(answer, message, f"the answer of {url}")[2:]
    if not fits or response.tst_info.nonce != request.nonce:
        raise TimestampError(
            "The authority stamped something else", expected="our digest and nonce", found="others"
        )
    return answer


def read_stamp(response: bytes, message: bytes, trusted: list[Certificate] | None = None) -> Stamp:
    """What ``response`` says of ``message``, offline. TimestampError where it is no time stamp.

    ``trusted``: certificates that are believed: the authority's own, or of its roots (intermediate ones may
    be among them). They have to be valid at the time that is stamped, not today.
    """
    rfc = client()
    when, authority, fits, found = _said(response, message, "the time stamp")
    if trusted is None:
        return Stamp(when, authority, fits, None)
    builder = rfc.VerifierBuilder()
    for certificate in trusted:
        builder = builder.add_root_certificate(certificate)
    try:
        with warnings.catch_warnings(action="ignore"):
            builder.build().verify_message(found, message)
    except Exception as cause:  # what the parsers raise on hostile bytes has no common kind
        return Stamp(when, authority, fits, False, _why(cause))
    return Stamp(when, authority, fits, True)


def load_certificates(path: str | os.PathLike[str]) -> list[Certificate]:
    """The X.509 certificates in a PEM file, each once; TimestampError where there are none."""
    from cryptography import x509

    data = read_limited(path, what="file of certificates", error=TimestampError, limit=_LIMIT)
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as cause:
        raise TimestampError(
            "The certificates can't be read",
            expected="one X.509 certificate or more, in PEM",
            found=str(path),
            fix="Take the authority's certificate, or its CA's, as PEM",
        ) from cause
    return list(dict.fromkeys(found))


def _post(url: str, body: bytes, timeout: float) -> bytes:
    try:
        import httpx2
    except ImportError as cause:
        raise UsageError(
            "Time stamps need httpx2", found="no such package", fix="pip install 'gradmark[claim]'"
        ) from cause
    headers = {"content-type": "application/timestamp-query", "accept": "application/timestamp-reply"}
    try:
        with httpx2.stream("POST", url, content=body, headers=headers, timeout=timeout) as answer:
            answer.raise_for_status()
            data = b""
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > _LIMIT:
                    raise TimestampError("The authority's answer is too big", expected=f"{_LIMIT} bytes")
            return data
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as cause:
        raise TimestampError(
            "The time stamp authority can't be reached",
            expected="an http(s):// address that answers RFC 3161 requests",
            found=f"{type(cause).__name__} at {url.partition('?')[0].rpartition('@')[2]}",
            fix="Check the address, or claim without --timestamp and have the claim stamped later",
        ) from cause


def _said(data: bytes, message: bytes, what: str) -> tuple[datetime, str, bool, Any]:
    """Time, authority, whether it is of ``message``, and the parsed response. TimestampError on all else."""
    rfc = client()
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd serial numbers and the like
            response = rfc.decode_timestamp_response(data)
            refused = response.status not in (0, 1)
            if not refused:
                info = response.tst_info
                when = info.gen_time.astimezone(UTC)
                return when, _authority(response), _fits(info, message), response
            said = "; ".join(response.status_string) or f"status {response.status}"
    except Exception as cause:  # what the parsers raise on hostile bytes has no common kind
        order = "its certificates are not in DER's order" if "SetOrdering" in str(cause) else ""
        raise TimestampError(
            f"{what[0].upper()}{what[1:]} can't be read",
            expected="an RFC 3161 response",
            found=order or f"{len(data)} bytes of another kind",
            fix="Take a time stamp of another authority" if order else "",
        ) from cause
    raise TimestampError("The authority refused to stamp", found=said[:200], fix="Try another authority")


def _fits(info: Any, message: bytes) -> bool:
    """Whether the imprint is the SHA-512 of ``message``, the one digest that is asked for."""
    imprint = info.message_imprint
    same = bytes(imprint.message) == hashlib.sha512(message).digest()
    return imprint.hash_algorithm.dotted_string == _SHA512 and same


def _authority(response: Any) -> str:
    """The signer's subject, as its certificate in the response has it."""
    from cryptography import x509

    signers = {(s.issuer, s.serial_number) for s in response.signed_data.signer_infos}
    for data in response.signed_data.certificates:
        certificate = x509.load_der_x509_certificate(bytes(data))
        if (certificate.issuer, certificate.serial_number) in signers:
            return certificate.subject.rfc4514_string()[:200]
    return "unnamed"


def _why(cause: Exception) -> str:
    """The reasons in OpenSSL's error stack, or the first line of what was raised."""
    reasons = [*re.findall(r'reason: "([^"]+)"', str(cause)), *re.findall(r'data: "([^"]+)"', str(cause))]
    return "; ".join(reasons)[:200] or (str(cause).splitlines() or [type(cause).__name__])[0][:200]
