"""Mutation tests: change one token of the trainer's core at a time, and run the tests of that line.

    pip install -e '.[test]' coverage cosmic-ray
    python tests/mutants.py --sample 320

The mutants come from Cosmic Ray. Each sampled place in the source gets one of its mutants, drawn at
random. Annotations are excluded, because a mutant there either fails on import or changes nothing.
`coverage` records which tests execute which line; a mutant is killed if one of the tests that
execute its line fails, or if the tests do not end. Results are appended to a file, so an
interrupted run continues.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from xml.etree import ElementTree

import coverage
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db

ROOT = Path(__file__).parents[1]
CORE = [
    *(f"rounds/{name}" for name in ("round", "gradient", "exact", "sums")),
    *(f"rounds/{name}" for name in ("state", "schedule", "evaluate")),
    *(f"models/tasks/{name}" for name in ("task", "objectives", "targets", "named")),
    "data/batches",
    *(f"aggregate/{path.stem}" for path in sorted((ROOT / "ctde_jax/aggregate").glob("[!_]*.py"))),
]
TIMEOUT = 600
"""Timeout for the tests of a mutant, in seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "modules", nargs="*", default=CORE, help="modules of ctde_jax, such as aggregate/mean"
    )
    parser.add_argument("--tests", nargs="*", help="test files (default: all)")
    parser.add_argument("--sample", type=int, default=320, help="number of mutants")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--most-tests",
        type=int,
        default=60,
        help="maximum number of tests per mutant: the module's file first, then the fastest",
    )
    parser.add_argument("--folder", type=Path, default=Path("mutants"), help="coverage and results")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    programs = options.folder.absolute() / "programs"

    files = options.tests or [
        str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/**/test_*.py"))
    ]
    tests = measure(options.folder, options.processes, programs, files)
    chosen = sample(
        [ROOT / "ctde_jax" / f"{name}.py" for name in options.modules], options.sample, options.seed
    )
    results = options.folder / "results.jsonl"
    known = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    done = {tuple(result["mutant"]) for result in known}

    known_tests = [
        f"{tests['paths'][name.split('.')[0]]}::{name.split('.')[1]}" for name in tests["seconds"]
    ]
    subprocess.run(
        [sys.executable, *pytest(), "--collect-only", "-qq", *known_tests], cwd=ROOT, check=True
    )
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.processes) as pool:
        for number in range(options.processes):
            copies.put(
                shutil.copytree(
                    ROOT,
                    Path(temporary) / str(number),
                    ignore=shutil.ignore_patterns(".git", "mutants"),
                )
            )

        def run(mutant) -> dict:
            copy = copies.get()
            try:
                return judge(mutant, copy, tests, programs, options.most_tests)
            finally:
                copies.put(copy)

        for number, result in enumerate(
            pool.map(run, [mutant for mutant in chosen if mutant not in done]), 1
        ):
            known.append(result)
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                (
                    f"{number:4} {result['outcome']:9} {result['seconds']:5.0f} s  "
                    f"{result['diff'][:150]}"
                ),
                flush=True,
            )
    report([result for result in known if tuple(result["mutant"]) in set(chosen)])


def measure(folder: Path, processes: int, programs: Path, files: list[str]) -> dict[str, dict]:
    """Runs the default tests once; returns the tests of each line, and the seconds of each test."""
    data, durations = folder / ".coverage", folder / "durations.json"
    if not durations.exists():
        rc = folder / "coveragerc"
        rc.write_text(
            f"[run]\ndynamic_context = test_function\nsource = {ROOT / 'ctde_jax'}\n"
            f"parallel = true\ndata_file = {data.absolute()}\n"
        )

        def run(number: int) -> list[tuple[str, float, bool]]:
            report = folder / f"junit-{number}.xml"
            command = [
                sys.executable,
                "-m",
                "coverage",
                "run",
                f"--rcfile={rc}",
                *pytest(),
                f"--junitxml={report}",
            ]
            subprocess.run(
                [*command, *files[number::processes]], cwd=ROOT, env=environment(ROOT, programs)
            )
            cases = ElementTree.parse(report).iter("testcase")
            return [
                (
                    short(f"{c.get('classname')}.{c.get('name')}"),
                    float(c.get("time", 0)),
                    c.find("failure") is not None,
                )
                for c in cases
            ]

        with ThreadPoolExecutor(processes) as pool:
            seconds = Counter()
            cases = [case for cases in pool.map(run, range(processes)) for case in cases]
            for name, duration, _ in cases:
                seconds[name] += duration
            for name in {name for name, _, is_failed in cases if is_failed}:
                print(f"left out, as it fails without a mutant: {name}")
                del seconds[name]
        subprocess.run([sys.executable, "-m", "coverage", "combine", f"--rcfile={rc}"], check=True)
        durations.write_text(json.dumps(seconds))
    covered = coverage.CoverageData(str(data))
    covered.read()
    lines = {}
    for path in covered.measured_files():
        by_line = covered.contexts_by_lineno(path)
        lines[str(Path(path).relative_to(ROOT))] = {
            line: {short(c) for c in cs if c} for line, cs in by_line.items()
        }
    paths = {path.stem: str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py")}
    return {"lines": lines, "seconds": json.loads(durations.read_text()), "paths": paths}


def short(name: str) -> str:
    """Returns the file and function of a test, without folders and parameters; both are unique."""
    return ".".join(name.split("[")[0].split(".")[-2:])


def sample(paths: list[Path], count: int, seed: int) -> list[tuple]:
    """Returns mutants `(module, operator, occurrence, line)`, at most one per source place."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/work.sqlite") as database:
        init(paths, database, {})
        mutations = [mutation for item in database.work_items for mutation in item.mutations]
    annotated = {path: annotations(path) for path in paths}
    by_place = defaultdict(list)
    for mutation in mutations:
        path, (line, column) = Path(mutation.module_path), mutation.start_pos
        if not any(start <= (line, column) < end for start, end in annotated[path]):
            key = (str(path.relative_to(ROOT)), line, column)
            by_place[key].append((key[0], mutation.operator_name, mutation.occurrence, line))
    rng = random.Random(seed)
    places = rng.sample(sorted(by_place), min(count, len(by_place)))
    return [rng.choice(sorted(by_place[place])) for place in places]


def annotations(path: Path) -> list[tuple]:
    """Returns the start and the end of annotations and type aliases."""
    nodes = []
    for node in ast.walk(ast.parse(path.read_text())):
        nodes += [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Subscript)
            and node.col_offset == 0
        ):
            nodes.append(node.value)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))
        for n in nodes
        if isinstance(n, ast.expr)
    ]


def judge(mutant: tuple, copy: Path, tests: dict, programs: Path, most: int) -> dict:
    """Runs the tests of a mutant's line in a copy of the tree."""
    module, operator, occurrence, line = mutant
    path = copy / module
    source = path.read_text()
    mutated = mutate_code(source, get_operator(operator)(), occurrence)
    before, after = source.splitlines()[line - 1].strip(), mutated.splitlines()[line - 1].strip()
    diff = f"{module}:{line}: {before}  ->  {after}"
    chosen = tests_of(module, line, tests)[:most]
    if not chosen:
        # pytest would run all tests.
        return {"mutant": mutant, "outcome": "no tests", "diff": diff, "seconds": 0, "tests": 0}
    started = os.times().elapsed
    try:
        path.write_text(mutated)
        command = [sys.executable, *pytest(), "-x", *chosen]
        status = subprocess.run(
            command,
            cwd=copy,
            env=environment(copy, programs),
            timeout=TIMEOUT,
            capture_output=True,
            text=True,
        )
        outcome = "survived" if status.returncode == 0 else "killed"
    except subprocess.TimeoutExpired:
        outcome = "killed"
    finally:
        path.write_text(source)
    return {
        "mutant": mutant,
        "outcome": outcome,
        "diff": diff,
        "seconds": os.times().elapsed - started,
        "tests": len(chosen),
    }


def tests_of(module: str, line: int, tests: dict) -> list[str]:
    """Returns the tests of a line (if it runs on import, of the nearest), the module's first."""
    lines = tests["lines"].get(module, {})
    near = sorted(lines, key=lambda other: abs(other - line))
    contexts = (
        next((lines[other] for other in near if lines[other]), set()) & tests["seconds"].keys()
    )
    stem = Path(module).stem

    def cost(context: str) -> tuple[bool, float]:
        return not context.startswith(f"test_{stem}."), tests["seconds"][context]

    chosen = [context.split(".") for context in sorted(contexts, key=cost)]
    return [f"{tests['paths'][file]}::{name}" for file, name in chosen]


def pytest() -> list[str]:
    return [
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-q",
        "-m",
        "not slow",
    ]


def environment(copy: Path, programs: Path) -> dict[str, str]:
    """Returns an environment in which all runs share compiled programs."""
    shared = {"JAX_COMPILATION_CACHE_DIR": str(programs), "PYTEST_XDIST_WORKER": "gw0"}
    return {**os.environ, **shared, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}


def report(results: list[dict]) -> None:
    """Prints a table by module, and the survivors."""
    by_module = defaultdict(Counter)
    for result in results:
        by_module[result["mutant"][0]][result["outcome"] == "killed"] += 1
    print("| module | mutants | killed |\n|---|---|---|")
    for module, counts in sorted(by_module.items()):
        print(f"| {module} | {counts.total()} | {counts[True]} |")
    killed = sum(counts[True] for counts in by_module.values())
    print(f"| all | {len(results)} | {killed} ({killed / max(1, len(results)):.1%}) |")
    for result in results:
        if result["outcome"] != "killed":
            print(f"{result['outcome']}: {result['diff']}")


if __name__ == "__main__":
    main()
