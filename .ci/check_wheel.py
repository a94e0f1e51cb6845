"""Check the installed package against a checkout: all files are there, and all modules import without any extra.

python .ci/check_wheel.py CHECKOUT, from a folder outside the checkout, in an environment with the wheel alone.
"""

import pkgutil
import sys
from importlib import import_module
from pathlib import Path

import hinge

checkout, installed = Path(sys.argv[1]).resolve() / "hinge", Path(hinge.__file__).parent
if installed == checkout:
    sys.exit("the checkout itself is imported, and the wheel is to be checked")
files = (path for path in checkout.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
wanted = {path.relative_to(checkout) for path in files}
missing = sorted(str(path) for path in wanted if not (installed / path).is_file())
if missing:
    sys.exit(f"the wheel lacks {', '.join(missing)}")
names = [module.name for module in pkgutil.walk_packages(hinge.__path__, "hinge.")]
for name in names:
    if not name.endswith("__main__"):
        import_module(name)
print(f"wheel: {len(wanted)} files, {len(names)} modules, hinge {hinge.__version__}")
