"""Draws docs/rooms.svg: the folders of the package, floor above floor, and which imports which.

An arc joins two floors where a module of the upper one imports the lower one. The more modules do, the wider it is.

    python docs/draw_rooms.py [--check]     writes it; --check: status 1 unless it is as the imports are now
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "resnet_kernels"
PICTURE = ROOT / "docs" / "rooms.svg"

FLOORS = {
    "cli": "python -m resnet_kernels",
    "perf": "measuring: timing, profiling, rooflines, tuning",
    "fusion": "the user's verbs: fuse, unfuse, explain, verify",
    "runtime": "calling a fused module",
    "graph": "what a module computes, as data",
    "ops": "torch.ops.resnet_kernels, backends, candidates",
    "kernels": "device code and launchers",
    "models": "the networks in plain PyTorch",
}
TOP, HEIGHT, GAP, LEFT, WIDTH = 16, 54, 22, 16, 470


def main() -> int:
    picture = draw()
    if "--check" in sys.argv[1:]:
        return 0 if PICTURE.exists() and PICTURE.read_text() == picture else 1
    PICTURE.write_text(picture)
    return 0


def imports() -> Counter[tuple[str, str]]:
    """(upper floor, lower floor) -> how many modules of the upper one import the lower one."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] not in FLOORS:
            continue
        below = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*parts[: len(parts) - node.level], *(node.module or "").split(".")]
                names = [base[1]] if base[1:] and base[1] else [alias.name for alias in node.names]
                below |= {name for name in names if name in FLOORS and name != parts[1]}
        found.update((parts[1], name) for name in below)
    return found


def rooms(floor: str) -> str:
    """The folders of a floor, with how many modules each has."""
    folders = [PACKAGE / floor, *sorted(path for path in (PACKAGE / floor).iterdir() if path.is_dir())]
    counts = {path: sum(p.name != "__init__.py" for p in path.glob("*.py")) for path in folders}
    return ", ".join(f"{path.relative_to(PACKAGE)}/ ({count})" for path, count in counts.items() if count)


def draw() -> str:
    places = {floor: TOP + i * (HEIGHT + GAP) for i, floor in enumerate(FLOORS)}
    height = TOP + len(FLOORS) * (HEIGHT + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#0072B2"/></marker></defs>',
    ]
    for floor, y in places.items():
        lines += [
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#F3F6FA" stroke="#555"/>',
            f'<text x="{LEFT + 12}" y="{y + 22}" font-size="16" font-weight="bold">{escape(floor)}</text>',
            f'<text x="{LEFT + 92}" y="{y + 22}" font-size="13" fill="#333">{escape(FLOORS[floor])}</text>',
            f'<text x="{LEFT + 92}" y="{y + 42}" font-size="12" fill="#666">{escape(rooms(floor))}</text>',
        ]
    for (upper, lower), count in sorted(imports().items()):
        start, end = places[upper] + HEIGHT - 12, places[lower] + 12
        x = LEFT + WIDTH
        bend = x + 18 + 0.42 * abs(end - start)
        color = "#0072B2" if end > start else "#D55E00"  # an arc up would be a fault
        lines.append(
            f'<path d="M{x},{start} C{bend:.0f},{start} {bend:.0f},{end} {x + 2},{end}" fill="none" stroke="{color}" '
            f'stroke-opacity="0.75" stroke-width="{min(5, 0.6 + 0.25 * count):.2f}" marker-end="url(#tip)">'
            f"<title>{upper} imports {lower}: {count} modules</title></path>"
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
