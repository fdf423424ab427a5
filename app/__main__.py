"""``python -m app`` is ``vramplan``, from this folder, where the package need not be installed.

The package is imported by its own name: numba's caches, which lie beside the code, name the module that they are of,
and a cache that names another one cannot be read. A process that is spawned imports this module, too.
"""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if "vramplan" not in sys.modules:
    folder = Path(__file__).parent
    spec = spec_from_file_location("vramplan", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules["vramplan"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)

if __name__ == "__main__":
    import_module("vramplan.cli").main()
