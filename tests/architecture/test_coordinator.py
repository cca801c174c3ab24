"""The coordinator runs on the bare install: every module of it imports where torch and its friends are absent."""

import json
import subprocess
import sys

from tests.architecture.test_commands import HEAVY

IMPORT_ALL = """
import importlib, importlib.abc, json, pkgutil, sys

blocked = sys.argv[1:]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return None

sys.meta_path.insert(0, Absent())

import peerturb_coordinator

found = [module.name for module in pkgutil.walk_packages(peerturb_coordinator.__path__, "peerturb_coordinator.")]
for name in found:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(json.dumps({"imported": found, "modules": sorted(sys.modules)}))
"""


def test_coordinator_imports_without_the_numerics() -> None:
    command = [sys.executable, "-c", IMPORT_ALL, *HEAVY, "psutil", "scipy"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert "peerturb_coordinator.cli" in report["imported"]
    assert not [name for name in report["modules"] if name.startswith(("peerturb.zo", "peerturb_node", "peerturb_sim"))]
    # It is a dependency for nodes' sake: a coordinator of small rounds keeps a sixth of its memory without it.
    assert "numpy" not in report["modules"]
