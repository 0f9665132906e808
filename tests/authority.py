"""A real time stamp authority on loopback: ``openssl ts`` behind a tiny HTTP server."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

CONFIG = """
[tsa]
default_tsa = tsa_config
[tsa_config]
serial = {folder}/serial
crypto_device = builtin
signer_cert = {folder}/tsa.pem
signer_key = {folder}/tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha512
accuracy = secs:1
ess_cert_id_chain = no
ess_cert_id_alg = sha256
"""


@dataclass
class Authority:
    """``ca``, ``tsa``: certificates in PEM. ``answers``: what to send in place of a stamp, once each."""

    folder: Path
    url: str = ""
    answers: list[bytes] = field(default_factory=list)
    asked: int = 0

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def tsa(self) -> Path:
        return self.folder / "tsa.pem"

    def stamp(self, query: bytes) -> bytes:
        """openssl's response to an RFC 3161 request."""
        (self.folder / "query.tsq").write_bytes(query)
        files = ("-config", "tsa.cnf", "-queryfile", "query.tsq", "-out", "reply.tsr")
        subprocess.run(["openssl", "ts", "-reply", *files], cwd=self.folder, check=True, capture_output=True)
        return (self.folder / "reply.tsr").read_bytes()


def make_authority(folder: Path, name: str = "Test authority") -> Authority:
    """A certificate authority and its time stamp signer, with fresh keys."""
    now = datetime.now(UTC)

    def certificate(subject: str, ca: bool, issuer: str, signer: ec.EllipticCurvePrivateKey | None) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            usage = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.TIME_STAMPING])
            builder = builder.add_extension(usage, critical=True)
        made = builder.sign(signer or key, hashes.SHA256())
        stem = "ca" if ca else "tsa"
        (folder / f"{stem}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        keys.append(key)
        plain = serialization.NoEncryption()
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        (folder / f"{stem}.key").write_bytes(pem)

    keys: list[ec.EllipticCurvePrivateKey] = []
    certificate(f"{name} root", True, f"{name} root", None)
    certificate(name, False, f"{name} root", keys[0])
    (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder))
    (folder / "serial").write_text("01\n")
    return Authority(folder)


@contextmanager
def running(folder: Path, name: str = "Test authority") -> Iterator[Authority]:
    """The authority, listening on loopback; skips the test where openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl isn't installed: there is no time stamp authority to ask")
    folder.mkdir(exist_ok=True)
    authority = make_authority(folder, name)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["content-length"]))
            authority.asked += 1
            reply = authority.answers.pop(0) if authority.answers else authority.stamp(query)
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        authority.url = f"http://127.0.0.1:{server.server_port}/"
        try:
            yield authority
        finally:
            server.shutdown()
            thread.join()
