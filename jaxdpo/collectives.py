"""What a compiled program sends between devices: its collectives, counted in its text.

Left out: which of them overlap with arithmetic, and how fast a link is.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
_OPERATION = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")


def sent(text: str) -> dict[str, tuple[int, int]]:
    """How often each kind of collective runs in a compiled program, and the bytes a device sends.

    A ring sends (n - 1) / n of what all n devices of a group have together, for an all-reduce
    twice. What stands in a loop counts as often as the loop turns.

    >>> sent('''
    ... ENTRY %main {
    ...   %x = f32[16]{0} all-reduce(%y), replica_groups={{0,1,2,3}}, to_apply=%add
    ... }''')
    {'all-reduce': (1, 96)}
    """
    bodies, entry = _computations(text)
    turns: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        turns[name] += times
        for line in bodies.get(name, ()):
            for called, more in _calls(line, bodies):
                visit(called, times * more)

    visit(entry, 1)
    found: dict[str, tuple[int, int]] = {}
    for name, times in turns.items():
        for kind, sent in _sent(bodies.get(name, [])):
            count, total = found.get(kind, (0, 0))
            found[kind] = (count + times, total + times * sent)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module, by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if begun := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = begun[2]
            entry, bodies[name] = (name if begun[1] else entry), []
        elif line.startswith("}"):
            name = ""
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that an instruction calls, and how often each."""
    loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if loop:
        yield loop[2], _trips(line, bodies[loop[1]])
    for names in re.findall(
        r"(?:calls|to_apply|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)", line
    ):
        yield from ((called, 1) for called in re.findall(r"[\w.\-]+", names))


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop turns: as the compiler says, or what its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(known[1])
    bounds = re.findall(r"[su]32\[\][^ ]* constant\((\d+)\)", "\n".join(condition))
    return int(bounds[0]) if len(bounds) == 1 else 1


def _sent(lines: list[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if not (found := _OPERATION.search(line)):
            continue
        arrays = [
            _BYTES.get(dtype, 4) * math.prod(map(int, filter(None, size.split(","))))
            for dtype, size in re.findall(r"(\w+)\[([\d,]*)\]", found["shape"])
            if (dtype, size) != ("u32", "")  # a handle
        ]
        # A started gather or permutation holds what it is given beside what it makes.
        given_too = found["start"] and found["kind"] in ("all-gather", "collective-permute")
        size, group = sum(arrays[len(arrays) // 2 :] if given_too else arrays), _group(line)
        whole = size * group if found["kind"] == "reduce-scatter" else size
        times = 2 if found["kind"] == "all-reduce" else 1
        moved = size if found["kind"] == "collective-permute" else whole * (group - 1) // group
        yield found["kind"], times * moved


def _group(line: str) -> int:
    """How many devices share a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(tiled[2])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 1
