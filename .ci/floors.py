"""Print the oldest versions that pyproject.toml allows, as constraints: python .ci/floors.py > floors.txt"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["rewards"]]:
    print(re.sub(r"^([\w-]+)>=([\w.]+).*", r"\1==\2", requirement))
