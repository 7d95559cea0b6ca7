"""quire, vLLM and llama.cpp side by side on this machine's processor, in turn, with the limits of the machine.

    python bench/cpu/compare.py                                    # everything, three rounds; about two hours
    python bench/cpu/compare.py --quick --rounds 1                 # small versions, for a first look
    python bench/cpu/compare.py --workloads 1b-int8 tiny --engines quire vllm
    python bench/cpu/compare.py --json FILE --report               # the table of earlier runs again

Only one engine runs at a time, each in processes of its own; their order changes from round to round. The limits are
measured before and after each run. A run that others disturbed does not count and is repeated. Records are added to the
JSON file, so a long comparison may be made in pieces. bench/peers.md tells how the peers are installed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # modules are named from the root of the repository

from bench.cpu import ceilings, environment, plot, quiet, table  # noqa: E402
from bench.cpu.ceilings import Ceilings  # noqa: E402
from bench.cpu.engines import llama_cpp, quire, vllm  # noqa: E402
from bench.cpu.engines.session import Engine, EngineFailed, Session  # noqa: E402
from bench.cpu.place import ROOT, Place, peers_folder, processor  # noqa: E402
from bench.cpu.results import Record, ceilings_of, figures_of, row_of  # noqa: E402
from bench.cpu.store import Store, open_store  # noqa: E402
from bench.cpu.workloads import ENGINES, VARIANTS, Workload, chosen  # noqa: E402

ALL: dict[str, Engine] = {module.ENGINE.name: module.ENGINE for module in (quire, vllm, llama_cpp)}
SETTLE = 0.2  # seconds of quiet before the limits are measured


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine with one way of storing weights."""

    engine: str
    variant: str


@dataclass(frozen=True, slots=True)
class Rules:
    """When a run counts, and how often it is repeated."""

    attempts: int
    most_difference: float


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="names or parts of names; all when not given")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small versions of the workloads")
    parser.add_argument("--attempts", type=int, default=3, help="runs of one workload, when it is disturbed")
    parser.add_argument("--most-difference", type=float, default=ceilings.TOO_DIFFERENT, metavar="SHARE")
    parser.add_argument("--threads", type=int, default=len(processor().cores))
    parser.add_argument("--limit", type=float, default=900, metavar="SECONDS", help="for one workload")
    parser.add_argument("--load-limit", type=float, default=300, metavar="SECONDS", help="for the start of an engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where records are kept and added to")
    parser.add_argument("--report", action="store_true", help="measure nothing, print what the file holds")
    parser.add_argument("--list", action="store_true", help="print the names of the workloads")
    return parser.parse_args()


def main() -> int:
    """Measure what is asked for, and report."""
    found = parse()
    try:
        workloads = chosen(found.workloads, found.quick)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if found.list:
        print(*(f"{workload.name:18} {workload.title}" for workload in workloads), sep="\n")
        return 0
    peers = peers_folder()
    place = Place(peers, peers / "bench" / "logs", found.threads, found.limit, found.load_limit)
    stem = "quick" if found.quick else "full"
    path = found.json or ROOT / "bench" / "results" / "cpu" / f"{time.strftime('%Y-%m-%d-%H%M')}-{stem}.json"
    try:
        store = open_store(path, processor().describe(), found.quick, commit())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not found.report:
        quiet.adopt_orphans()
        try:
            program = ceilings.prepare(peers / "bench")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        rules = Rules(found.attempts, found.most_difference)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            Comparison(place, program, rules, store).run(workloads, found.engines, found.rounds)
        finally:
            quiet.end_leftovers(patience=0)  # whatever ended the comparison, no engine goes on
    report(store, chosen(None, found.quick))
    return 0


def commit() -> str:
    """Which version of quire this is."""
    done = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


class Comparison:
    """Runs the engines in turn and keeps what they reach."""

    def __init__(self, place: Place, program: Path, rules: Rules, store: Store) -> None:
        self.place = place
        self.program = program
        self.rules = rules
        self.store = store
        self.failed: set[tuple[str, Contender]] = set()  # not tried again

    def run(self, workloads: list[Workload], engines: list[str], rounds: int) -> None:
        """All rounds. Workloads of one group share a process of each engine."""
        groups: dict[tuple[str, str, str], list[Workload]] = {}
        for workload in workloads:
            groups.setdefault(workload.group, []).append(workload)
        for number in range(rounds):
            for index, group in enumerate(groups.values()):
                for contender in rotated(contenders(group[0], engines), number + index):
                    wanted = [
                        w for w in group if contender.engine in w.engines and (w.name, contender) not in self.failed
                    ]
                    # What does not depend on the moment is measured once.
                    wanted = [w for w in wanted if number == 0 or w.kind not in ("disk", "perplexity")]
                    if wanted:
                        self.run_group(wanted, contender, number)

    def run_group(self, group: list[Workload], contender: Contender, number: int) -> None:
        """One engine's turn. A failure ends its process; the next workload gets a new one."""
        engine = ALL[contender.engine]
        reason = engine.missing(self.place)
        session: Session | None = None
        for workload in group:
            print(
                f"round {number + 1}: {workload.name:18} {contender.engine:10} {contender.variant:9}",
                end=" ",
                flush=True,
            )
            if reason is not None:
                self.fail(workload, contender, number, reason)
                continue
            if workload.kind == "disk":
                size = size_of(contender.engine, self.place)
                details = {"packages": size.packages}
                self.keep(Record(workload.name, *names(contender), number, 0, size.bytes / 1e9, details=details))
                continue
            try:
                if session is None:
                    session = engine.open(self.place, workload, contender.variant)
                    session.prepare()
                self.attempt(session, workload, contender, number)
            except EngineFailed as error:
                self.fail(workload, contender, number, str(error))
                self.close(session)
                session = None
        self.close(session)

    def close(self, session: Session | None) -> None:
        """End an engine, and whatever it may have left behind: the next one must be alone."""
        if session is not None:
            session.close()
        quiet.end_leftovers()

    def attempt(self, session: Session, workload: Workload, contender: Contender, number: int) -> None:
        """Run until nobody disturbs it, or the attempts are used up."""
        for index in range(self.rules.attempts):
            before = self.limits(session)
            start = quiet.snapshot()
            answer = session.run(workload)
            others = quiet.others_between(start, quiet.snapshot())
            after = self.limits(session)
            difference = before.differ(after)
            disturbed = None
            if workload.kind not in ("memory", "perplexity"):  # these do not depend on who else is there
                disturbed = quiet.disturbance(others, difference, self.rules.most_difference)
            self.keep(
                Record(
                    workload.name,
                    *names(contender),
                    number,
                    index,
                    value=answer.value,
                    samples=answer.samples,
                    peak=answer.peak,
                    others=others,
                    difference=difference,
                    disturbed=disturbed,
                    ceilings=ceilings.mean([before, after]),
                    details=answer.details,
                )
            )
            if disturbed is None:
                break

    def limits(self, session: Session) -> Ceilings:
        """The machine as it is now, while the engine does not run."""
        session.hold()
        try:
            time.sleep(SETTLE)
            return ceilings.measure(self.program, self.place.threads)
        finally:
            session.release()

    def fail(self, workload: Workload, contender: Contender, number: int, reason: str) -> None:
        """Keep the reason; the other engines go on."""
        self.failed.add((workload.name, contender))
        self.keep(Record(workload.name, *names(contender), number, 0, failed=reason))

    def keep(self, record: Record) -> None:
        """Store a record and say what it is."""
        self.store.add(record)
        if record.value is None:
            print(f"failed: {record.failed}")
        else:
            mark = "" if record.disturbed is None else f"  thrown away: {record.disturbed}"
            read = "" if record.ceilings is None else f"  ({record.ceilings.read / 1e9:.1f} GB/s)"
            print(f"{record.value:.4g}{read}{mark}", flush=True)


def names(contender: Contender) -> tuple[str, str]:
    """Engine and variant, in the order of a record."""
    return contender.engine, contender.variant


def contenders(workload: Workload, engines: list[str]) -> list[Contender]:
    """Each way of running a group, in the order of the engines."""
    found = []
    for engine in engines:
        variants = VARIANTS[engine, workload.precision]
        if engine == "vllm" and workload.precision == "bf16" and not processor().has_bf16:
            variants = ("f32",)  # its bfloat16 is a plain loop on such a processor
        if workload.kind == "disk":
            variants = variants[:1]
        found += [Contender(engine, variant) for variant in variants]
    return found


def rotated(items: list[Contender], by: int) -> list[Contender]:
    """The same in another order."""
    at = by % len(items) if items else 0
    return items[at:] + items[:at]


def size_of(engine: str, place: Place) -> environment.Size:
    """What an engine takes on disk."""
    if engine == "quire":
        return environment.quire()
    if engine == "vllm":
        return environment.whole_environment(place.peers / "vllm")
    return environment.programs(place.peers / "llama" / "bin")


def report(store: Store, workloads: list[Workload]) -> None:
    """The table, the reasons, and the picture."""
    figures = figures_of(store.records)
    measured = {record.workload for record in store.records}
    rows = [row_of(workload, figures) for workload in workloads if workload.name in measured]
    limits = ceilings_of(store.records)
    versions = sorted({record.commit for record in store.records if record.engine == "quire" and record.commit})
    print(f"\n{store.machine}; quire {', '.join(versions)}{'; quick versions' if store.quick else ''}")
    if limits is not None:
        print(table.describe(limits))
    print("\n" + table.as_text(rows))
    for title, lines in (("Failed", table.failures(rows)), ("Disturbed", table.thrown_away(store.records))):
        if lines:
            print(f"\n{title}:", *(f"  {line}" for line in lines), sep="\n")
    store.path.with_suffix(".md").write_text(table.as_markdown(rows) + "\n")
    print(f"\nraw figures: {store.path}")
    if limits is None:
        return
    try:
        picture = store.path.with_suffix(".png")
        plot.draw(plot.points_of(workloads, figures), limits, store.machine, picture)
        print(f"roofline: {picture}")
    except ImportError:
        print("No picture: matplotlib is missing (pip install 'quire[bench]').")


if __name__ == "__main__":
    sys.exit(main())
