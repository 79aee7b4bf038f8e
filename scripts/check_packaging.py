"""Packaging guards: what the wheel holds, and that the callbacks import with the base dependencies alone."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {"lottery_lightning", "lottery_callbacks"}
BLOCKED = (
    "wandb",
    "torchvision",
    "scipy",
    "matplotlib",
    "curvlinops",
    "onnx",
    "onnxscript",
    "numba",
    "lottery_lightning",
)
IMPORT_ALONE = f"""
import importlib, pkgutil, sys
import lightning.pytorch  # what it imports itself is its own affair

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
for name in [name for name in sys.modules if name.split(".")[0] in {BLOCKED}]:
    del sys.modules[name]
import lottery_callbacks
for module in pkgutil.walk_packages(lottery_callbacks.__path__, "lottery_callbacks."):
    importlib.import_module(module.name)
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Named neither sdist nor wheel, `build` makes the sdist and then the wheel from it.
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, str(ROOT)]
        subprocess.run(build, check=True, capture_output=True)
        (wheel,) = Path(folder).glob("*.whl")
        top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    top = {name for name in top if not name.endswith(".dist-info")}
    if top != PACKAGES:
        print(f"the wheel holds {sorted(top)}, and should hold {sorted(PACKAGES)}")
        return 1
    alone = subprocess.run([sys.executable, "-c", IMPORT_ALONE], capture_output=True, text=True, check=False)
    if alone.returncode:
        print(f"lottery_callbacks does not import with its base dependencies alone:\n{alone.stderr}")
        return 1
    print("packaging: the wheel has exactly the two packages, and the callbacks import alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
