"""`python -m assay_check CERTIFICATE --weights FILE [--json]`: exits 0 if the claim is
supported, 1 if not, 2 for bad input.
"""

import argparse
import json

from assay_check import InputError, check

parser = argparse.ArgumentParser(
    prog="assay_check", description="Check a certificate (JSON) against its weights (safetensors)."
)
parser.add_argument("certificate")
parser.add_argument("--weights", help="needed by every task but gates")
parser.add_argument("--json", action="store_true")
arguments = parser.parse_args()
try:
    verdict = check(arguments.certificate, arguments.weights)
except (InputError, OSError) as error:
    parser.error(str(error))
print(json.dumps(verdict.plain()) if arguments.json else "\n".join(verdict.lines()))
raise SystemExit(not verdict.accepted)
