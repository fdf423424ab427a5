"""``python -m app`` is ``vramplan``, from this folder, where the package is not installed.

The package is imported by its own name. Numba's caches, which lie beside the code, name the module that they are of.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).parent
    spec = spec_from_file_location("vramplan", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules["vramplan"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)
    from vramplan.cli import main

    main()
