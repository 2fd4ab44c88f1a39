"""`python -m assay_check CERTIFICATE --weights FILE [--json]`: exits 0 if the claim is supported, 1 if not, 2 for bad input."""

import argparse
import json
import sys

from assay_check import InputError, check

parser = argparse.ArgumentParser(prog="assay_check", description="Check a certificate against the weights that it is about.")
parser.add_argument("certificate", help="the certificate, a JSON file")
parser.add_argument("--weights", required=True, help="the weights, a safetensors file")
parser.add_argument("--json", action="store_true", help="print JSON")
arguments = parser.parse_args()
try:
    verdict = check(arguments.certificate, arguments.weights)
except InputError as error:
    print(f"assay_check: {error}", file=sys.stderr)
    sys.exit(2)
if arguments.json:
    print(json.dumps({**vars(verdict), "bound": str(verdict.bound)}))
else:
    print(f"{'accepted' if verdict.accepted else 'rejected'}: {verdict.reason}")
sys.exit(0 if verdict.accepted else 1)
