"""How the golden seal was made: of the golden model, with the public key ``key-v1.json``. Never rerun.

A later version that finds the golden model anything but intact has broken every seal out there.
"""

from __future__ import annotations

from pathlib import Path

import torch

from golden.make import net
from gradmark import OwnerKey
from gradmark.protocols import ModelSpec
from gradmark.seal import make_seal
from gradmark.suspects import file_digest, load_weights

HERE = Path(__file__).resolve().parent


def main() -> None:
    torch.set_num_threads(1)
    weights, out = HERE / "golden-v1.safetensors", HERE / "seal-v1.json"
    model = net().eval()
    load_weights(model, weights)
    spec = ModelSpec("image", (1, 8, 8), 10, 0.0, 1.0, 16)
    seal = make_seal(
        model, OwnerKey.load(HERE / "key-v1.json"), spec, model=file_digest(weights), salt=bytes(16),
        created="2026-11-25T00:00:00Z",
    )  # fmt: skip
    seal.save(out)


if __name__ == "__main__":
    main()
