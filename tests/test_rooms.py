"""The rooms import only from rooms above them, and what two rooms must agree on without knowing each other."""

import ast
from pathlib import Path

import pytest

import layerskip_moe

PACKAGE = Path(layerskip_moe.__file__).parent
ROOMS = ["nn", "data", "training", "generation", "pretrained", "analysis", "bench", "ablation"]
MAY_IMPORT = {room: set(ROOMS[: place + 1]) for place, room in enumerate(ROOMS)}
MAY_IMPORT["generation"] = {"nn", "generation"}
MAY_IMPORT["pretrained"] = {"nn", "pretrained"}
MAY_IMPORT["nn"] = {"nn", "pretrained"}  # the one arrow down: from_pretrained and save_pretrained


def imported(path):
    """(module, whether at the top level) of every import in a file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room):
    for path in (PACKAGE / room).rglob("*.py"):
        for module, at_top in imported(path):
            parts = module.split(".")
            if parts[0] != "layerskip_moe" or len(parts) < 2 or parts[1] not in ROOMS:
                continue
            assert parts[1] in MAY_IMPORT[room], f"{path} imports {module}"
            assert not (room == "nn" and parts[1] == "pretrained" and at_top), f"{path} imports {module} at the top"


def test_torchtune_is_imported_late_and_in_one_file():
    uses = [
        (path.name, module, at_top)
        for path in PACKAGE.rglob("*.py")
        for module, at_top in imported(path)
        if module.split(".")[0] == "torchtune"
    ]
    assert uses, "and it is used"
    for name, module, at_top in uses:
        assert name == "torchtune_parts.py" and module.startswith("torchtune.modules") and not at_top
