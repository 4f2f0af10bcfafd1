"""Prints the table of docs/degradation.md from the records beside this file.

python docs/degradation/table.py
"""

import json
import pathlib
import re
import statistics

FOLDER = pathlib.Path(__file__).parent


def errors(path: pathlib.Path) -> tuple[float, float]:
    """The last training error and the last test error of a run, in %."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = {record["split"]: record for record in records}
    return tuple(100 * (1 - last[split]["top1"]) for split in ("train", "test"))


def cell(values: list[float]) -> str:
    """The mean over all seeds, with the lowest and the highest."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main() -> None:
    """Prints one row per depth."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for path in sorted(FOLDER.glob("*.jsonl")):
        kind, depth = re.match(r"(plain|resnet)(\d+)-", path.name).groups()
        found.setdefault((kind, int(depth)), []).append(errors(path))
    print("| layers | plain: training | plain: test | residual: training | residual: test |")
    print("| --- | --- | --- | --- | --- |")
    for depth in sorted({depth for _, depth in found}):
        cells = [
            cell([each[split] for each in found[kind, depth]])
            for kind in ("plain", "resnet")
            for split in (0, 1)
        ]
        print(f"| {depth} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
