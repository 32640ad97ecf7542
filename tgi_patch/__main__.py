"""`preft-tgi list | check | server | serve`, see docs/how-to/tgi.md."""

import argparse
import sys

from preft_core.seam import check_sources


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = argparse.ArgumentParser(prog="preft-tgi", description="PreFT adapters for TGI 3.3.7")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="print what is replaced or relied on in TGI, and why")
    commands.add_parser("check", help="compare the installed TGI with the table; exit status 1 if they differ")
    run = commands.add_parser("server", help="TGI's text-generation-server, patched")
    run.add_argument("rest", nargs=argparse.REMAINDER)
    run = commands.add_parser("serve", help="the whole service: launcher, gateway, adapters")
    run.add_argument("rest", nargs=argparse.REMAINDER, help="options of text-generation-launcher")
    options = parser.parse_args(arguments)
    if options.command == "serve":
        from tgi_patch.gateway.launcher import become_launcher_if_disabled

        become_launcher_if_disabled(options.rest)
        from tgi_patch.gateway.service import serve

        return serve(options.rest)
    from tgi_patch import launch, patches

    if options.command == "list":
        for seam in patches.ALL:
            kind = "replaced " if seam.replacement is not None else "relied on"
            print(f"{kind} {seam.digest} {seam.target}\n          {seam.why}")
        return 0
    if options.command == "check":
        return _check()
    launch.server(options.rest)
    return 0


def _check() -> int:
    from tgi_patch import patches

    faults = check_sources(patches.ALL)
    if faults:
        print(f"{len(faults)} of {len(patches.ALL)} entries do not fit the installed TGI:", file=sys.stderr)
        for fault in faults:
            print(f"- {fault}", file=sys.stderr)
        return 1
    print(f"all {len(patches.ALL)} entries fit the installed TGI")
    return 0


if __name__ == "__main__":
    sys.exit(main())
