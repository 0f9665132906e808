"""How the golden claim and opening were made. Never rerun: the point is that old files verify.

They claim a mark of 208 bits, in no model, under the public key ``key-v1.json``, stamped by an authority
on loopback (``openssl ts``) whose root is ``claim-v1-ca.pem``. It refuses to overwrite them.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from authority import running
from gradmark import catalog
from gradmark.claim import Claim, ClaimFile, FixedPool, ModelFile, Opening, pool_digest
from gradmark.claim.timestamp import request_stamp
from gradmark.codec import MarkFile
from gradmark.data import load_data
from gradmark.files import atomic_write, sha256
from gradmark.keys import OwnerKey

HERE = Path(__file__).resolve().parent


def main() -> None:
    key, scheme = OwnerKey.load(HERE / "key-v1.json"), catalog.scheme("ensemble")
    spec = load_data("digits").spec
    mark = MarkFile.create(key, scheme.name, scheme.parameters(), spec, "signed-rank", 200, salt=bytes(16))
    weights = (HERE / "golden-ensemble-v1.safetensors").read_bytes()
    pool = load_data("digits").test.all()
    claim = Claim.create(
        key,
        mark,
        model=ModelFile("golden-ensemble-v1.safetensors", sha256(weights)),
        pool=FixedPool("digits", pool_digest(pool), len(pool[0])),
        made=datetime.now(UTC),
    )
    file = ClaimFile.sign(key, claim)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "tsa", "Golden authority") as authority,
    ):
        file = file.with_stamp(request_stamp(authority.url, file.stamped))
        atomic_write(HERE / "claim-v1-ca.pem", authority.ca.read_bytes())
    file.save(HERE / "claim-v1.json")
    Opening.of(file, key).save(HERE / "opening-v1.json", None)


if __name__ == "__main__":
    main()
