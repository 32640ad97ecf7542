"""`python -m preft_vllm list | check`, see docs/how-to/vllm.md."""

import argparse
import sys

from preft_vllm import patches, plugin


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m preft_vllm", description="PreFT adapters for vLLM")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print every function of vLLM that is replaced or relied on, and why")
    commands.add_parser("check", help="compare the installed vLLM with the table; exit status 1 if they differ")
    if parser.parse_args(arguments).command == "list":
        for seam in patches.ALL:
            kind = "replaced " if seam.replacement is not None else "relied on"
            print(f"{kind} {seam.digest} {seam.target}\n          {seam.why}")
        return 0
    faults = plugin.faults()
    for fault in faults:
        print(f"- {fault}", file=sys.stderr)
    print(f"vLLM {plugin.vllm_version()}: {len(faults)} of {len(patches.ALL)} entries do not match")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
