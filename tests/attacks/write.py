"""Write every attack to a folder of its own, to try other loaders on: python tests/attacks/write.py OUT

Prints one JSON object per attack: its name, the path to open, and the words that our refusal holds.
"""

# ruff: noqa: T201  # a script: it prints
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from tests.attacks import directories, headers, indexes  # noqa: F401  # importing registers their attacks
from tests.attacks.making import ATTACKS

if __name__ == "__main__":
    for name, attack in ATTACKS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True)
        print(json.dumps({"attack": name, "open": str(attack.build(folder)), "refusal": attack.words}))
