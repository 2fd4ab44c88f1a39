"""Runs that are killed, damaged, robbed, doubled and starved of disk; prints what happened as JSON.

A script of its own, because each trial is a process forked from this one after the imports: real
kills at a hundredth of the price of a start. Nothing is computed in the parent, whose pools of
threads would not survive the fork.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import os
import pickle
import pkgutil
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import assay
import assay_check
from assay import cli
from assay.errors import InputError
from assay.io.commits import NAME
from assay.learn import loop

RUNS = {
    "tms-directions": [
        *("target.networks=2", "target.steps=60", "target.samples=40"),
        *("method.k=[3]", "method.steps=5"),
    ],
    "max-of-k": [
        *("model.vocabulary=4", "model.positions=2", "model.width=4", "training.steps=100"),
        *("proofs.strategies=[best]", "proofs.float32=false"),
    ],
    "digits-channels": [
        *(
            "training.steps=60",
            "audit.examples=20",
            "audit.exact=3",
            "audit.top=2",
            "audit.resplits=2",
        ),
        *("model.width=8", "model.hidden=4", "model.blocks=2"),
    ],
}
VERBS = {
    "tms-directions": ("report", "attribute", "explain", "run"),
    "max-of-k": ("report", "run"),
    "digits-channels": ("report", "attribute", "ablate", "run"),
}
# Numbers that a clock makes, and files that hold them or tell of every start.
CLOCKS = {"seconds", "cpu_seconds", "CPU seconds"}
APART = {NAME, "timing.json", "report.html", "versions.json"}
WEIGHTS = (5, 3, 2)  # how often each of the runs is taken: what it costs decides

KILLED = (-signal.SIGKILL, -signal.SIGPROF)

Action = list[str] | Callable[[], object]


class Campaign:
    """The trials in a folder, with a seed; `said` is what went wrong, `counts` what was tried."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        self.said: list[str] = []
        self.counts: Counter[str] = Counter()
        self.whole: dict[str, Path] = {}
        self.seconds: dict[str, tuple[float, float]] = {}  # by the clock, and of the processor
        self.spent = 0.0  # processor seconds of the last process that was waited for
        self.results: dict[str, dict[str, Any]] = {}
        self.printed: dict[tuple[str, str], str] = {}
        for name in RUNS:
            began = time.monotonic()
            self.whole[name] = folder / "whole" / name
            self.done(self.words(name, self.whole[name]))
            self.seconds[name] = time.monotonic() - began, self.spent
            for verb in VERBS[name]:
                self.printed[name, verb] = self.done(self.verb(name, verb, self.whole[name]))
            self.results[name] = self.read(self.whole[name])

    # Processes

    def words(self, name: str, folder: Path, *flags: str) -> list[str]:
        sets = [] if "--resume" in flags else [w for s in RUNS[name] for w in ("--set", s)]
        return ["run", name, *sets, "-o", str(folder), *flags]

    def verb(self, name: str, verb: str, folder: Path) -> list[str]:
        """Return a command that reads a finished run."""
        if verb == "run":
            return self.words(name, folder, "--resume")
        part = ["directions[0]"] if verb == "explain" else []
        return [verb, str(folder), *part, "--json"]

    def start(
        self, action: Action, limit: int | None = None, processor: float = 0
    ) -> tuple[int, Path]:
        """Fork a process that carries out a command or calls a function, with a limit on the size
        of its files; the system ends it after some `processor` seconds, as kill -9 does.
        """
        said = self.folder / f"said-{self.counts['processes']}"
        self.counts["processes"] += 1
        child = os.fork()
        if child:
            return child, said
        code = 99
        try:
            handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            # Nothing handles this signal: the process is gone at once, wherever it is.
            signal.setitimer(signal.ITIMER_PROF, processor)
            try:
                if callable(action):
                    action()
                    code = 0
                else:
                    sys.argv = ["assay", *action]
                    cli.main()
            except InputError as error:
                print("assay:", error)
                code = 2
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self, process: tuple[int, Path]) -> tuple[int, str]:
        """Return a process's exit code, negative for a signal, and what it said on both streams."""
        _, status, usage = os.wait4(process[0], 0)
        self.spent = usage.ru_utime + usage.ru_stime
        said = process[1].read_text(errors="replace") if process[1].exists() else ""
        process[1].unlink(missing_ok=True)
        return os.waitstatus_to_exitcode(status), said

    def done(self, action: Action) -> str:
        """Carry out what must succeed; return what it said."""
        code, said = self.wait(self.start(action))
        assert code == 0, (action, said)
        return said

    def read(self, folder: Path, but: str = "") -> dict[str, Any]:
        """Return `results` of a folder, computed in a process of its own."""
        place = self.folder / "results"
        self.done(lambda: place.write_bytes(pickle.dumps(results(folder, but))))
        found: dict[str, Any] = pickle.loads(place.read_bytes())
        return found

    def killed(self, name: str, words: list[str], share: float) -> tuple[int, str]:
        """Carry out a command and kill it at a share of what the whole run takes, now by the clock
        and now by its processor time, which a busy machine does not stretch.
        """
        clock, processor = self.seconds[name]
        if self.chance.random() < 0.75:
            return self.wait(self.start(words, processor=max(share * processor, 1e-3)))
        process = self.start(words)
        time.sleep(share * clock)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process[0], signal.SIGKILL)
        return self.wait(process)

    def complain(self, what: str) -> None:
        self.said.append(what)
        print(what, file=sys.stderr, flush=True)

    # Judgements

    def expect(self, what: str, code: int, said: str, accepted: tuple[int, ...]) -> bool:
        """Note a traceback, another exit code than those accepted, and more than one line."""
        errors = [line for line in said.splitlines() if line.startswith("assay:")]
        if "Traceback" in said or code not in accepted or (code == 2 and len(errors) != 1):
            self.complain(f"{what}: exit {code}, {said[-400:]!r}")
            return False
        return True

    def same(self, what: str, name: str, folder: Path, but: str = "") -> bool:
        """Note final numbers that differ from those of the run that nothing disturbed, the file
        `but` apart.
        """
        found, wanted = self.read(folder, but), self.results[name]
        names = {one for one in {*found, *wanted} if one != but and not one.startswith("verb-")}
        if differ := sorted(one for one in names if found.get(one) != wanted.get(one)):
            self.complain(f"{what}: {differ} differ")
        return not differ

    def pick(self) -> str:
        return self.chance.choices(list(RUNS), WEIGHTS)[0]

    # Trials

    def kills(self, count: int) -> None:
        """Kill runs and resumed runs at random times until `count` died, and let each end."""
        while self.counts["kills"] < count:
            name, folder = self.pick(), self.folder / "killed"
            flags: tuple[str, ...] = ()
            for attempt in range(5):
                words = self.words(name, folder, *flags)
                if attempt < 4:
                    code, said = self.killed(name, words, self.chance.uniform(0, 0.9))
                else:
                    code, said = self.wait(self.start(words))
                if code not in KILLED:
                    break
                self.counts["kills"] += 1
                # A process killed before it made the folder leaves nothing to resume.
                flags = ("--resume",) if (folder / "config.json").exists() else ()
            if self.expect(f"kill {name}", code, said, (0,)):
                self.same(f"kill {name}", name, folder)
                self.counts["killed runs ended"] += 1
            shutil.rmtree(folder, ignore_errors=True)

    def damaged(self, count: int, what: str, damage: Callable[[Path], bool]) -> None:
        """Damage one file of a run, finished or killed, and read the run back; every file of every
        run has its turn.
        """
        for name, finished, lost, verb in itertools.islice(self.turns(), count):
            folder = self.folder / "damaged"
            shutil.copytree(self.whole[name] if finished else self.unfinished(name), folder)
            if not damage(folder / lost):
                (folder / lost).write_bytes(b"\0")
            self.counts[what] += 1
            label = f"{what} {name}/{lost} {verb} {'finished' if finished else 'killed'}"
            code, said = self.wait(self.start(self.verb(name, verb, folder)))
            if self.expect(label, code, said, (0, 2)):
                self.counts[f"{what} named" if code else f"{what} harmless"] += 1
                if code == 0:
                    self.same(label, name, folder, lost)
                    whole = self.printed[name, verb].replace(str(self.whole[name]), str(folder))
                    if finished and said != whole:
                        self.complain(f"{label}: prints {said!r}, without damage {whole!r}")
            shutil.rmtree(folder)

    def turns(self) -> Iterator[tuple[str, bool, str, str]]:
        """Yield runs, whether they are finished, a file of theirs and a verb that reads them."""
        while True:
            cases = []
            for name, finished in itertools.product(RUNS, (True, False)):
                source = self.whole[name] if finished else self.unfinished(name)
                for path in sorted(source.rglob("*")):
                    if path.is_file():
                        verb = self.chance.choice(VERBS[name]) if finished else "run"
                        cases.append((name, finished, str(path.relative_to(source)), verb))
            self.chance.shuffle(cases)
            yield from cases

    def unfinished(self, name: str) -> Path:
        """Return a run of the kind that was killed in its middle, made once for each."""
        folder = self.folder / "unfinished" / name
        while not folder.exists():
            self.killed(name, self.words(name, folder), self.chance.uniform(0.1, 0.7))
            checkpoints = [*folder.rglob("*.pt")] if folder.exists() else []
            if not checkpoints or (folder / "summary.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        return folder

    def files(self, count: int, what: str, damage: Callable[[Path], bool]) -> None:
        """Damage certificates, advice, weights and circuits that lie outside of runs, and read them
        by the commands that take them.
        """
        whole = self.folder / "files"
        if not whole.exists():
            self.done(lambda: make_files(whole))
        run = self.whole["tms-directions"] / "model.safetensors"
        cases = {
            "certificate.json": lambda folder: check(folder),
            "certificate.advice.safetensors": lambda folder: check(folder),
            "net.safetensors": lambda folder: prove(folder),
            "circuit.json": lambda folder: lambda: show_circuit(folder / "circuit.json"),
            "toy.safetensors": lambda folder: lambda: show_tensors(folder / "toy.safetensors"),
        }
        if not (whole / "toy.safetensors").exists():
            shutil.copy(run, whole / "toy.safetensors")
        for name, action in itertools.islice(itertools.cycle(cases.items()), count):
            folder = self.folder / "damaged"
            before = self.wait(self.start(action(whole)))
            assert before[0] == 0, (name, before)
            shutil.copytree(whole, folder)
            damage(folder / name)
            self.counts[what] += 1
            code, said = self.wait(self.start(action(folder)))
            # The checker rejects (1) a claim that the files no longer support.
            if self.expect(f"{what} {name}", code, said, (0, 1, 2)):
                self.counts[f"{what} named" if code else f"{what} harmless"] += 1
                if code == 0 and said != before[1]:
                    self.complain(f"{what} {name}: gives {said!r}, undamaged {before[1]!r}")
                if code == 1 and "reason" not in said:
                    self.complain(f"{what} {name}: rejected without a reason, {said!r}")
            shutil.rmtree(folder)

    def rivals(self, count: int) -> None:
        """Start two processes in one folder, in both orders of --force and --resume; one may be
        refused, and they never mix.
        """
        orders = itertools.cycle(itertools.product(["--force", "--resume"], repeat=2))
        for flags in itertools.islice(orders, count):
            name, folder = "tms-directions", self.folder / "rivals"
            shutil.copytree(self.unfinished(name), folder)
            both = []
            for flag in flags:
                both.append(self.start(self.words(name, folder, flag)))
                time.sleep(self.chance.uniform(0, 0.1))
            ends = [self.wait(process) for process in both]
            self.counts["rivals"] += 1
            for code, said in ends:
                self.expect(f"rivals {flags}", code, said, (0, 2))
                self.counts["rivals refused"] += code == 2
                if code == 2 and "in use by another process" not in said:
                    self.complain(f"rivals {flags}: {said!r}")
            if min(code for code, _ in ends) != 0:
                self.complain(f"rivals {flags}: none ended, {ends}")
            else:
                self.same(f"rivals {flags}", name, folder)
            shutil.rmtree(folder)

    def full_disks(self, count: int) -> None:
        """Run out of room at many places: of a small disk where one can be had, and of a limit on
        the size of files; give room, and resume.
        """
        for trial in range(count):
            name = list(RUNS)[trial % len(RUNS)]
            sizes = [path.stat().st_size for path in self.whole[name].rglob("*")]
            share = self.chance.uniform(0.01, 0.95) ** 2  # the report alone is nine tenths
            with small_disk(self.folder / "disk") as disk:
                disk = disk if trial % 2 else None
                folder = (disk or self.folder) / "run"
                kind = "disk" if disk else "limit"
                if disk:
                    resize(disk, max(int(sum(sizes) * share), 20_000))
                limit = None if disk else int(max(sizes) * share)
                code, said = self.wait(self.start(self.words(name, folder), limit))
                self.counts[f"full {kind}s"] += 1
                self.expect(f"full {kind}", code, said, (1,))
                if "left on device" not in said and "File too large" not in said:
                    self.complain(f"full {kind}: {said!r}")
                if disk:
                    resize(disk, 4 * sum(sizes))
                # Without room for its config a run has not begun.
                flags = ("--resume",) if (folder / "config.json").exists() else ()
                code, said = self.wait(self.start(self.words(name, folder, *flags)))
                if self.expect(f"after a full {kind}", code, said, (0,)):
                    self.same(f"after a full {kind}", name, folder)
                shutil.rmtree(folder, ignore_errors=True)


def make_files(folder: Path) -> None:
    """Write weights, a certificate with advice, and a circuit."""
    import torch

    from assay.edges.graph import EdgeGraph
    from assay.io.circuits import write_circuit
    from assay.proofs.max_of_k.prove import prove as prove_weights
    from assay.targets.max_of_k import MaxOfK, save

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = save(folder / "net.safetensors", MaxOfK(4, 2, 4, generator=generator))
    certificate = folder / "certificate.json"
    prove_weights(weights, "box_exact", "real", certificate_path=certificate)
    graph = EdgeGraph(2, 2, 8)
    scores = torch.randn(graph.mask.shape, generator=generator, dtype=torch.float64) * graph.mask
    write_circuit(folder / "circuit.json", graph.to_circuit(scores, (scores > 0) & graph.mask))


def check(folder: Path) -> list[str]:
    names = (folder / "certificate.json", folder / "net.safetensors")
    return ["check", str(names[0]), "--weights", str(names[1]), "--json"]


def prove(folder: Path) -> list[str]:
    return ["prove", "max-of-k", str(folder / "net.safetensors"), "--strategy", "box_exact"]


def show_circuit(path: Path) -> None:
    from assay.io.circuits import read_circuit

    print(read_circuit(path))


def show_tensors(path: Path) -> None:
    from assay.io.files import load_tensors

    print({name: tensor.tolist() for name, tensor in sorted(load_tensors(path).items())})


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Mount a small disk, None where the system does not let us."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        there = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        there = False
    try:
        yield folder if there else None
    finally:
        if there:
            subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, size: int) -> None:
    pages = math.ceil(size / 4096)
    subprocess.run(["mount", "-o", f"remount,size={pages * 4}k", str(disk)], check=True)


def results(folder: Path, but: str = "") -> dict[str, Any]:
    """Return the final numbers of a run by file, without what a clock makes and without the file
    `but`: a reader of tables may end the process on damaged bytes.
    """
    import polars as pl
    import torch

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name in APART or path == folder / but:
            continue
        content: Any = path.read_bytes()
        with contextlib.suppress(Exception):  # damaged: the bytes stand for themselves
            if path.suffix == ".parquet":
                table = pl.read_parquet(path)
                content = table.drop(CLOCKS & {*table.columns}).write_csv()
            elif path.suffix == ".pt":
                # A state that was loaded has the same values under other identities.
                content = repr(exact(torch.load(path, weights_only=True)))
            elif path.name == "summary.json":
                content = without_clocks(json.loads(content))
        found[str(path.relative_to(folder))] = content
    return found


def exact(value: Any) -> Any:
    """Return nested tensors as lists, whose text gives every bit."""
    if isinstance(value, dict):
        return {key: exact(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [exact(entry) for entry in value]
    return [str(value.dtype), value.tolist()] if hasattr(value, "tolist") else value


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(entry) for key, entry in value.items() if key not in CLOCKS}
    return [without_clocks(entry) for entry in value] if isinstance(value, list) else value


def warm() -> None:
    """Import what the commands import, and make the scripts of a report, which take a second."""
    for package in (assay, assay_check):
        modules = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", lambda _: None)
        for module in modules:
            # The command imports nothing of the extra that holds JAX.
            if not (module.name.endswith("__main__") or ".components.jax" in module.name):
                importlib.import_module(module.name)
    for name in ("altair", "scipy.optimize", "scipy.stats", "sklearn.datasets", "flint"):
        importlib.import_module(name)
    importlib.import_module("assay.report.page")._bundle()
    # Checkpoints often enough for kills between them, in runs of a second.
    assert loop.fit.__kwdefaults__ is not None
    loop.fit.__kwdefaults__["save_every"] = 20


def main(folder: Path, seed: int, counts: dict[str, int]) -> None:
    warm()
    campaign = Campaign(folder, seed)
    chance = campaign.chance

    def flip(path: Path) -> bool:
        data = bytearray(path.read_bytes())
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        return bool(data)

    def lose(path: Path) -> bool:
        if chance.random() < 0.5 and path.stat().st_size:
            path.write_bytes(b"")
        else:
            path.unlink()
        return True

    parts: list[Callable[[], None]] = [lambda: campaign.kills(counts.get("kills", 0))]
    for what, damage in (("flips", flip), ("missing", lose)):
        outside = counts.get(what, 0) // 4
        inside = counts.get(what, 0) - outside
        parts += [
            partial(campaign.damaged, inside, what, damage),
            partial(campaign.files, outside, what, damage),
        ]
    parts += [
        lambda: campaign.rivals(counts.get("rivals", 0)),
        lambda: campaign.full_disks(counts.get("full", 0)),
    ]
    for part in parts:
        part()
        print(dict(campaign.counts), file=sys.stderr, flush=True)
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(entry.ru_utime + entry.ru_stime for entry in usage)
    print(json.dumps({"said": campaign.said, "counts": campaign.counts, "cpu": round(seconds)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
