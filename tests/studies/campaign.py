"""Runs that are killed, damaged, robbed, doubled and starved of disk; prints what happened as JSON.

A script of its own, because each trial is a process forked from this one after the imports: real
kills at a hundredth of the price of a start. Nothing is computed in the parent, whose copies of
thread pools would not survive the fork.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from assay import cli
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
        *("training.steps=60", "audit.examples=20", "audit.exact=3", "audit.top=2"),
        *("model.width=8", "model.hidden=8", "model.blocks=2"),
    ],
}
# Numbers that a clock makes, and the record, whose commits tell of every start.
CLOCKS = {"seconds", "cpu_seconds", "CPU seconds"}
APART = {NAME, "timing.json", "report.html", "versions.json"}
WEIGHTS = (6, 6, 1)  # how often each of the runs is taken: what it costs decides


class Campaign:
    """The trials in a folder, with a seed; `said` is what went wrong."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.chance = folder, random.Random(seed)
        self.said: list[str] = []
        self.counts: Counter[str] = Counter()
        self.whole: dict[str, Path] = {}
        self.seconds: dict[str, float] = {}
        self.results: dict[str, dict[str, Any]] = {}
        for name in RUNS:
            began = time.monotonic()
            self.whole[name] = folder / "whole" / name
            code, said = self.wait(self.start(self.words(name, self.whole[name])))
            assert code == 0, said
            self.seconds[name] = time.monotonic() - began
            self.results[name] = results(self.whole[name])

    def words(self, name: str, folder: Path, *flags: str) -> list[str]:
        sets = [] if "--resume" in flags else [w for s in RUNS[name] for w in ("--set", s)]
        return ["run", name, *sets, "-o", str(folder), *flags]

    def start(self, words: list[str], limit: int | None = None) -> tuple[int, Path]:
        """Fork a process that runs the command, with a limit on the size of its files."""
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
            sys.argv = ["assay", *words]
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def wait(self, process: tuple[int, Path]) -> tuple[int, str]:
        """Return a process's exit code, negative for a signal, and what it said on both streams."""
        status = os.waitpid(process[0], 0)[1]
        said = process[1].read_text(errors="replace") if process[1].exists() else ""
        process[1].unlink(missing_ok=True)
        return os.waitstatus_to_exitcode(status), said

    def expect(self, what: str, code: int, said: str, accepted: tuple[int, ...]) -> bool:
        """Note a traceback, another exit code than those accepted, and more than one line."""
        errors = [line for line in said.splitlines() if line.startswith("assay:")]
        if "Traceback" in said or code not in accepted or (code and len(errors) != 1):
            self.said.append(f"{what}: exit {code}, {said[-300:]!r}")
            return False
        return True

    def same(self, what: str, name: str, folder: Path) -> None:
        """Note final numbers that differ from those of the run that nothing disturbed."""
        if (found := results(folder)) != self.results[name]:
            differ = sorted(
                key
                for key in {*found, *self.results[name]}
                if found.get(key) != self.results[name].get(key)
            )
            self.said.append(f"{what}: {differ} differ")

    def pick(self) -> str:
        return self.chance.choices(list(RUNS), WEIGHTS)[0]

    def kills(self, count: int) -> None:
        """Kill runs and resumed runs at random times until `count` died, and let each end."""
        while self.counts["kills"] < count:
            name, folder = self.pick(), self.folder / "killed"
            flags: tuple[str, ...] = ()
            for attempt in range(6):
                process = self.start(self.words(name, folder, *flags))
                if attempt < 5:
                    time.sleep(self.chance.uniform(0, 1.1 * self.seconds[name]))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process[0], signal.SIGKILL)
                code, said = self.wait(process)
                self.counts["kills"] += code == -signal.SIGKILL
                if code == 0:
                    break
                # A process killed before it made the folder leaves nothing to resume.
                flags = ("--resume",) if (folder / "config.json").exists() else ()
                if code != -signal.SIGKILL:
                    self.expect(f"kill {name}", code, said, (0,))
                    break
            self.expect(f"kill {name}", code, said, (0, -signal.SIGKILL))
            if code == 0:
                self.same(f"kill {name}", name, folder)
                self.counts["ended"] += 1
            shutil.rmtree(folder, ignore_errors=True)

    def damaged(self, count: int, what: str, damage: Callable[[Path], bool]) -> None:
        """Damage one file of a run, finished or killed, and read the run back in every way."""
        for _ in range(count):
            name, folder = self.pick(), self.folder / "damaged"
            finished = self.chance.random() < 0.7
            shutil.copytree(self.whole[name] if finished else self.unfinished(name), folder)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            path = self.chance.choice(files)
            if not damage(path):
                path = folder / NAME
                damage(path)
            self.counts[what] += 1
            lost = path.relative_to(folder)
            verbs_ = ("report", "attribute") if finished and name != "max-of-k" else ("report",)
            commands = (
                [[verb, str(folder), "--json"] for verb in verbs_]
                if finished
                else [self.words(name, folder, "--resume")]
            )
            for words in commands:
                code, said = self.wait(self.start(words))
                label = f"{what} {name}/{lost} {words[0]} {'finished' if finished else 'killed'}"
                if self.expect(label, code, said, (0, 2)) and code == 0:
                    self.counts[f"{what} not read"] += 1
                    self.unharmed(label, name, folder, str(lost), said)
            shutil.rmtree(folder)

    def unharmed(self, what: str, name: str, folder: Path, lost: str, said: str) -> None:
        """Note a command that went on and whose numbers are not those of the undamaged run."""
        found, wanted = results(folder), dict(self.results[name])
        for results_ in (found, wanted):
            results_.pop(lost, None)  # it is damaged, and was not read
            for verb in [key for key in results_ if key.startswith("verb-")]:
                results_.pop(verb)
        if found != wanted:
            differ = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
            self.said.append(f"{what}: went on with other numbers, {sorted(differ)}, {said[:200]}")
        report = folder / "report.html"
        if report.exists() and lost != "report.html":
            there, whole = (text(path) for path in (report, self.whole[name] / "report.html"))
            if there != whole:
                self.said.append(f"{what}: another report")

    def unfinished(self, name: str) -> Path:
        """Return a run of the kind that was killed in its middle, made once for each."""
        folder = self.folder / "unfinished" / name
        while not folder.exists():
            process = self.start(self.words(name, folder))
            time.sleep(self.chance.uniform(0.2, 0.8) * self.seconds[name])
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0], signal.SIGKILL)
            self.wait(process)
            begun = (folder / "config.json").exists() and (folder / "versions.json").exists()
            if not begun or (folder / "summary.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
        return folder

    def rivals(self, count: int) -> None:
        """Start two processes in one folder at once; one may wait for its turn, none may mix."""
        for _ in range(count):
            name, folder = "tms-directions", self.folder / "rivals"
            flags = self.chance.choice(["--force", "--resume"])
            if flags == "--resume":
                shutil.copytree(self.unfinished(name), folder)
            both = [self.start(self.words(name, folder, flags)) for _ in range(2)]
            ends = [self.wait(process) for process in both]
            self.counts["rivals"] += 1
            for code, said in ends:
                self.expect(f"rivals {flags}", code, said, (0, 2))
                self.counts["refused rivals"] += code == 2
                if code == 2 and "in use by another process" not in said:
                    self.said.append(f"rivals: {said!r}")
            if min(code for code, _ in ends) != 0:
                self.said.append(f"rivals: none ended, {ends}")
            else:
                self.same(f"rivals {flags}", name, folder)
            shutil.rmtree(folder)

    def full_disks(self, count: int) -> None:
        """Run out of room at many places: of a small disk where one can be had, of a limit on the
        size of files elsewhere; give room, and resume.
        """
        for trial in range(count):
            name = "tms-directions" if trial % 2 else "digits-channels"
            size = sum(path.stat().st_size for path in self.whole[name].rglob("*"))
            with small_disk(self.folder / "disk") as disk:
                folder = (disk or self.folder) / "run"
                kind = "disk" if disk else "limit"
                room = int(size * self.chance.uniform(0.02, 0.95))
                if disk:
                    resize(disk, max(room, 20_000))
                largest = max(path.stat().st_size for path in self.whole[name].rglob("*"))
                limit = None if disk else int(largest * self.chance.uniform(0.02, 0.95))
                code, said = self.wait(self.start(self.words(name, folder), limit))
                self.counts[f"full {kind}"] += 1
                self.expect(f"full {kind}", code, said, (1,))
                if "left on device" not in said and "File too large" not in said:
                    self.said.append(f"full {kind}: {said!r}")
                if disk:
                    resize(disk, 4 * size)
                started = (folder / "config.json").exists()
                flags = ("--resume",) if started else ()
                code, said = self.wait(self.start(self.words(name, folder, *flags)))
                if self.expect(f"after a full {kind}", code, said, (0,)):
                    self.same(f"after a full {kind}", name, folder)
                shutil.rmtree(folder, ignore_errors=True)


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


def results(folder: Path) -> dict[str, Any]:
    """Return the final numbers of a run: its JSON without clocks, and the bytes of the rest."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name not in APART:
            found[name] = text(path) if path.suffix == ".json" else path.read_bytes()
            if path.suffix == ".parquet":
                found[name] = len(found[name]) > 0  # compared through the report, without clocks
            if name == "summary.json":
                with contextlib.suppress(ValueError):
                    found[name] = without_clocks(json.loads(found[name]))
    return found


def text(path: Path) -> str:
    return path.read_text(errors="replace")


def without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clocks(entry) for key, entry in value.items() if key not in CLOCKS}
    return value


def main(folder: Path, seed: int, counts: dict[str, int]) -> None:
    # Checkpoints often enough for kills between them, in runs of a second.
    assert loop.fit.__kwdefaults__ is not None
    loop.fit.__kwdefaults__["save_every"] = 20
    campaign = Campaign(folder, seed)
    chance = campaign.chance

    def flip(path: Path) -> bool:
        data = bytearray(path.read_bytes())
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        return bool(data)

    def remove(path: Path) -> bool:
        path.unlink()
        return True

    campaign.kills(counts["kills"])
    campaign.damaged(counts["flips"], "flips", flip)
    campaign.damaged(counts["missing"], "missing", remove)
    campaign.rivals(counts["rivals"])
    campaign.full_disks(counts["full"])
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(entry.ru_utime + entry.ru_stime for entry in usage)
    print(json.dumps({"said": campaign.said, "counts": campaign.counts, "cpu": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
