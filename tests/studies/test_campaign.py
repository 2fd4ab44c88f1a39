"""The campaign of kills, flips, missing files, rivals and full disks over runs and other files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Of 100 kills, 300 flips, 200 missing files, 8 rivals and 12 full disks that were tried with
# `python tests/studies/campaign.py DIR SEED COUNTS`, a quarter, and half of the last two.
COUNTS = {"kills": 25, "flips": 75, "missing": 50, "rivals": 4, "full": 6}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform == "win32", reason="forks and signals of POSIX systems")
def test_nothing_is_lost_and_nothing_silently_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback, no silent change and no other final number in any trial."""
    script = Path(__file__).with_name("campaign.py")
    words = [sys.executable, str(script), str(tmp_path), "0", json.dumps(COUNTS)]
    # What goes wrong is said on stderr as it happens.
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    counts = found["counts"]
    with capsys.disabled():
        print(f"\ncampaign: {counts}, {len(found['said'])} complaints, {found['cpu']} CPU s")
    assert found["said"] == []
    assert counts["kills"] >= COUNTS["kills"]
    assert counts["killed runs ended"] > COUNTS["kills"] // 10
    for what in ("flips", "missing", "rivals"):
        assert counts[what] == COUNTS[what]
    assert counts["flips named"] > COUNTS["flips"] // 2
    assert counts["full limits"] + counts.get("full disks", 0) == COUNTS["full"]
