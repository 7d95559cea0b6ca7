"""What the innermost loops of a native library cost, read from its machine code: no processor that can run it is needed.

    python tools/hot_loops.py LIBRARY_OR_OBJECT PATTERN [--cpu znver4] [--mca llvm-mca-19] [--listing]

For every loop with dot products in a function whose name matches PATTERN: instructions, products, loads, prefetches,
vector registers that go through the stack, and the cycles of one round as llvm-mca sees them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

PRODUCT = re.compile(r"\bv(dpbf16ps|pdpbusd|fmadd\d+ps|pmaddwd|pmaddubsw)\b")
JUMP = re.compile(r"(j\w+)\s+([0-9a-f]+)\b")


@dataclass(frozen=True, slots=True)
class Function:
    name: str
    places: list[int]
    instructions: list[str]

    def innermost(self) -> Iterator[list[str]]:
        """The instructions of each loop that holds no other loop and at least one product."""
        at = {place: index for index, place in enumerate(self.places)}
        loops = []
        for end, text in enumerate(self.instructions):
            jump = JUMP.match(text)
            start = at.get(int(jump.group(2), 16)) if jump else None
            if start is not None and start <= end:
                loops.append((start, end))
        for start, end in loops:
            holds = any((start, end) != other and start <= other[0] and other[1] <= end for other in loops)
            body = self.instructions[start : end + 1]
            if not holds and any(map(PRODUCT.search, body)):
                yield body


def functions_of(path: str, pattern: str) -> Iterator[Function]:
    """The functions of a file whose names match, as objdump prints them."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in text.split("\n\n"):
        head, *lines = part.strip().splitlines() or [""]
        name = re.match(r"[0-9a-f]+ <(.*)>:$", head)
        if name is None or not re.search(pattern, name.group(1)):
            continue
        found = [match for line in lines if (match := re.match(r"\s*([0-9a-f]+):\s+([^#]*)", line))]
        yield Function(name.group(1), [int(m.group(1), 16) for m in found], [m.group(2).strip() for m in found])


def cycles_of(body: list[str], cpu: str, mca: str) -> float:
    """Cycles of one round of a loop on a model of `cpu`, caches always hit."""
    lines = ["1:", *(JUMP.sub(r"\1 1b", re.sub(r"<.*>", "", text)) for text in body), ""]
    command = [mca, "-mtriple=x86_64", f"-mcpu={cpu}", "-iterations=300"]
    report = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    found = re.search(r"Total Cycles:\s+(\d+)", report)
    assert found is not None
    return int(found.group(1)) / 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("pattern", help="regular expression for names of functions, for example 'Multiply<quire::bf16'")
    parser.add_argument("--cpu", default="znver4")
    parser.add_argument("--mca", default="llvm-mca-19")
    parser.add_argument("--listing", action="store_true", help="print the instructions, too")
    options = parser.parse_args()
    print(f"{'':56s}{'instr':>7s}{'dots':>6s}{'loads':>7s}{'fetch':>7s}{'stack':>7s}{'cycles':>8s}")
    for function in functions_of(options.file, options.pattern):
        name = re.sub(r"quire::|\(anonymous namespace\)::", "", function.name).split("(")[0]
        for body in function.innermost():
            fetches = sum(text.startswith("prefetch") for text in body)
            counts = (
                len(body),
                sum(map(bool, map(PRODUCT.search, body))),
                sum("(" in text and not text.startswith(("prefetch", "lea", "nop")) for text in body),
                fetches,
                sum(bool(re.search(r"\(%r[sb]p\)", text)) and "mm" in text for text in body),
            )
            cycles = cycles_of(body, options.cpu, options.mca)
            print(f"{name:56s}{counts[0]:7d}{counts[1]:6d}{''.join(f'{n:7d}' for n in counts[2:])}{cycles:8.1f}")
            if options.listing:
                print("\n".join(f"    {text}" for text in body))


if __name__ == "__main__":
    main()
