"""The verb over networks and properties of other tools' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from assay.io.vnnlib import read_vnnlib
from assay.proofs.certificate import check_destination
from assay.proofs.unsafe import verify
from assay.targets.onnx_network import load_onnx


def verify_files(
    network: Path | str, claim: Path | str, *, seconds: float, certificate: Path | str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Return what is known of a property of a network, as plain values and in words.

    Raises InputError as `load_onnx`, `read_vnnlib` and `verify` do, and for a certificate in the
    place of another file."""
    if certificate is not None:
        check_destination(certificate, (network, claim))
    found = verify(load_onnx(network), read_vnnlib(claim), seconds=seconds, certificate=certificate)
    plain = found.plain() | {"network": str(network), "property": str(claim)}
    spent = f"{found.boxes} boxes, {found.seconds:.1f} CPU s"
    bound = "none" if plain["bound"] is None else f"{found.bound:.4g}"
    match found.verdict:
        case "holds":
            lines = [f"holds: proved at level {found.level} with {spent}"]
            lines.append(f"the output stays at least {bound} from unsafe")
        case "violated":
            assert found.counterexample is not None
            lines = [f"violated: an input of the box has an unsafe output ({spent})"]
            broken = found.counterexample
            lines += [f"X_{i} = {x!r}" for i, x in enumerate(broken.inputs)]
            lines += [f"Y_{i} = {y!r}" for i, y in enumerate(broken.outputs)]
            lines.append(
                "Y as the network computes it; that the output is unsafe holds in real arithmetic"
            )
        case _:
            lines = [
                f"open: neither proved nor broken ({spent})",
                f"bound reached {bound}, least found {found.value:.4g},"
                f" open {found.open_share:.2%} of the boxes' volume",
            ]
    if found.verdict == "holds":
        lines += [f"assumes: {line}" for line in found.assumptions]
    if found.certificate is not None:
        lines.append(f"certificate: {found.certificate}")
    return plain, lines
