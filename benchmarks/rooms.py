"""Draw the rooms of gradleak from its imports: which room imports which, and how often; `docs/rooms.md` is its output.

python benchmarks/rooms.py > docs/rooms.md
"""

from __future__ import annotations

from collections import Counter

from gradleak.contract.imports import core, graph

HALL = "the front hall"
"""Modules of gradleak itself: what authors of plugins import."""


def room_of(module: str) -> str:
    """Return the folder that a module is in."""
    room, inner, _ = module.partition(".")
    return room if inner or core()[module].name == "__init__.py" else HALL


def arrows() -> dict[str, Counter[str]]:
    """Return for each room the others that it imports, and how many modules of it do."""
    found: dict[str, Counter[str]] = {}
    for module, targets in graph().items():
        if module in ("", "__main__"):
            continue
        rooms = {room_of(target) for target in targets if target} - {room_of(module)}
        found.setdefault(room_of(module), Counter()).update(rooms)
    return found


def layers(arrows: dict[str, Counter[str]]) -> list[list[str]]:
    """Return the rooms from the top down, each above those that it imports; the hall, which all share, last."""
    left, found = {room: set(targets) - {HALL} for room, targets in arrows.items() if room != HALL}, []
    while left:
        imported = set().union(*left.values())
        top = sorted(left.keys() - imported)
        if not top:
            raise SystemExit(f"rooms import each other in a circle: {', '.join(sorted(left))}")
        found.append(top)
        left = {room: targets for room, targets in left.items() if room not in top}
    return [*found, [HALL]]


def main() -> None:
    """Print the drawing."""
    found = arrows()
    sizes = Counter(room_of(module) for module in graph() if module not in ("", "__main__"))
    print("# Rooms\n\nDrawn from the imports by `python benchmarks/rooms.py > docs/rooms.md`.\n")
    print("An arrow says how many modules of a room import the other. Arrows between rooms point downwards only.\n")
    print("```mermaid\ngraph TD")
    for rank in layers(found):
        for room in rank:
            print(f'    {room.replace(" ", "_")}["{room} ({sizes[room]} modules)"]')
    for room in sorted(found):
        for target, count in sorted(found[room].items()):
            if target != HALL and room != HALL:
                print(f"    {room} -->|{count}| {target}")
    print("```\n\nModules of the front hall that look into a room, which lies below them:\n")
    for module, targets in sorted(graph().items()):
        inner = sorted({room_of(target) for target in targets if target} - {HALL})
        if module not in ("", "__main__") and room_of(module) == HALL and inner:
            print(f"- `{module}`: {', '.join(inner)}")


if __name__ == "__main__":
    main()
