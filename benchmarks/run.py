"""Everything that is measured, one after the other: ``make bench``. Finished cells are skipped.

The CIFAR-10 part needs the shared data folder (``GRADMARK_SHARED`` or ``../shared``) and hours on two
cores; without the folder it is left out with a word.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cifar import SHARED

HERE = Path(__file__).parent


def main() -> None:
    scripts = ["digits.py", "ablation.py", "cost.py"]
    if (SHARED / "data" / "cifar10_jpeg.npz").exists():
        scripts += ["cifar10.py", "innocents.py"]
    else:
        print("No shared data folder: CIFAR-10 and the third-party networks are left out.")
    for script in [*scripts, "tables.py"]:
        print(f"== {script}", flush=True)
        subprocess.run([sys.executable, str(HERE / script)], check=True)


if __name__ == "__main__":
    main()
