"""`preft push | pull | verify | convert | export`: adapters on the Hub, and conversion from and to plain LoRA."""

import json as format
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

Token = Annotated[
    str | None, typer.Option(envvar="HF_TOKEN", help="Token for the Hub. Default: that of `hf auth login`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def push(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of saved adapters.")],
    to: Annotated[str, typer.Option(help="org/name; for several adapters the org, each is named by its folder.")],
    private: Annotated[bool, typer.Option("--private", help="Make new repositories private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    subfolder: Annotated[str, typer.Option(help="Folder in the repository.")] = "",
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload prefill-only adapter",
    token: Token = None,
    json: Json = False,
) -> None:
    """Check adapters and push each to the Hub, with a model card."""
    if len(adapters) > 1 and "/" in to:
        raise ValueError(
            f"--to is {to!r} for {len(adapters)} adapters: give the org alone; each is named by its folder"
        )
    targets = {folder: to if len(adapters) == 1 else f"{to}/{folder.resolve().name}" for folder in adapters}
    if len(set(targets.values())) < len(adapters):
        raise ValueError(
            f"two of {', '.join(map(str, adapters))} would go to one repository: each is named by its folder; push "
            "them one by one"
        )
    options = {"token": token, "private": private or None, "revision": revision, "create_pr": create_pr}
    options |= {"subfolder": subfolder, "commit_message": message}
    made: list[dict[str, Any]] = []
    try:
        with Progress(console=Console(stderr=True), disable=len(adapters) == 1) as progress:
            for folder, target in progress.track(targets.items(), description="push"):
                made.append(_pushed(folder, target, options))
    finally:
        # after Ctrl-C too: what was pushed is on the Hub
        _show_pushed(made, json)
    if any(facts["error"] is not None for facts in made):
        raise typer.Exit(1)


def _pushed(folder: Path, target: str, options: dict[str, Any]) -> dict[str, Any]:
    """Pushes one adapter and returns the result, including its error."""
    from preft_core.format.adapter import read_config
    from preft_core.hub.push_pull import push_adapter

    facts = {"folder": str(folder), "repository": target, "commit": None, "url": None, "pull_request": None}
    try:
        _check_base_name(read_config(folder).base_model_name_or_path)
        return facts | vars(push_adapter(folder, target, **options)) | {"error": None}
    except (ValueError, RuntimeError, OSError) as error:
        # a bad adapter or card, an upload that failed, a Hub that refuses
        return facts | {"error": str(error)}


def _check_base_name(name: str | None) -> None:
    """Raises a ValueError if an adapter names its base model by a path, which nobody else can load."""
    if name is not None and (name.startswith(("/", ".", "~")) or "\\" in name or Path(name).exists()):
        raise ValueError(
            f"the base model is {name!r}, a path on this machine, so nobody who downloads the adapter finds it: name "
            "it by its Hub id, with `preft train --base-name org/model`, or as base_model_name_or_path in "
            "adapter_config.json"
        )


def _show_pushed(made: list[dict[str, Any]], json: bool) -> None:
    if json:
        print(format.dumps(made, indent=1))
    for facts in made:
        if facts["error"] is not None:
            _say(f"{facts['folder']}: {facts['error']}")
        elif not json:
            print(f"{facts['repository']}@{facts['commit']}  {facts['pull_request'] or facts['url']}")


def pull(
    places: Annotated[
        list[str], typer.Argument(help="org/name, org/name@revision, or a manifest such as preft.toml.")
    ],
    output: Annotated[Path | None, typer.Option(help="Output folder; several adapters get a subfolder each.")] = None,
    pin: Annotated[Path | None, typer.Option(help="Write a manifest with the commits that were downloaded.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of concurrent downloads.")] = 8,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download adapters, check them, and print their folders."""
    from preft_core.hub.manifest import name_fault, write_manifest
    from preft_core.hub.push_pull import pinned, pull_adapters

    adapters = _named(places, by_folder=True)
    if len(adapters) == 1 and output is not None and not _is_manifest(places[0]):
        output = Path(os.path.abspath(output))
        adapters, output = {output.name: places[0]}, output.parent
    faults = [f"{name!r}: {fault}" for name in adapters if (fault := name_fault(name))]
    if pin is not None and faults:
        raise ValueError(f"--pin {pin} cannot name {'; '.join(faults)}: give --output another folder name")
    with Progress(console=Console(stderr=True), disable=len(adapters) == 1) as progress:
        bar = progress.add_task("pull", total=len(adapters))
        found = pull_adapters(
            adapters, output, max_workers=workers, progress=lambda one: progress.advance(bar), token=token
        )
    if json:
        print(format.dumps([vars(one) for one in found], indent=1, default=str))
    for one in found:
        if one.error is None and not json:
            print(f"{one.name}  {one.location}  {one.directory}")
    failed = [one for one in found if one.error is not None]
    for one in failed:
        _say(f"{one.name}: {one.error}")
    if pin is not None and not failed:
        write_manifest(pin, pinned(found))
    elif pin is not None:
        _say(f"{pin} is not written: {len(failed)} of {len(found)} adapters could not be downloaded")
    if failed:
        raise typer.Exit(1)


def verify(
    adapters: Annotated[list[str], typer.Argument(help="Folders, Hub ids, or a manifest.")],
    base: Annotated[str | None, typer.Option(help="Base model for the self-test: Hub id or folder.")] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Check files against the format; with --base also check that they fit it and leave its decoding unchanged."""
    from preft_core.hub.push_pull import pull_adapter

    model = None
    if base is not None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, token=token).eval()
    results: list[dict[str, Any]] = []
    for name, place in _named(adapters).items():
        facts: dict[str, Any] = {"name": name, "ok": True}
        try:
            source, directory = pull_adapter(place, token=token)
            facts |= {"location": source.location, "fingerprint_recorded": source.config.fingerprint is not None}
            if model is not None:
                import copy

                from preft_hf.verify import try_adapter

                facts |= try_adapter(directory, copy.deepcopy(model))
        except (ValueError, RuntimeError, OSError) as error:
            # bad files, or good ones that do not fit this base model
            facts |= {"ok": False, "error": str(error)}
        results.append(facts)
        if not json:
            print(f"{'ok  ' if facts['ok'] else 'BAD '} {name}" + ("" if facts["ok"] else f": {facts['error']}"))
    if json:
        print(format.dumps(results, indent=1))
    if not all(facts["ok"] for facts in results):
        raise typer.Exit(1)


def convert(
    lora: Annotated[Path, typer.Argument(help="Folder of a plain PEFT LoRA.")],
    output: Annotated[Path, typer.Option(help="Folder for the LoRA-P adapter.")],
) -> None:
    """Convert a plain LoRA to a prefill-only adapter: the same weights, applied to prompt tokens only."""
    from preft_core.format.plain_lora import from_lora

    print(from_lora(lora, output))
    Console(stderr=True).print(
        "The LoRA was trained to act on every token and now acts on prompt tokens only, so expect a weaker effect. "
        "`preft distill` keeps more of it.",
        soft_wrap=True,
    )


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA-P adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the plain LoRA.")],
) -> None:
    """Convert a LoRA-P adapter to a plain PEFT LoRA, which acts on every token."""
    from preft_core.format.plain_lora import to_lora

    to_lora(adapter, output)
    Console(stderr=True).print(
        "Written as a plain LoRA: it now acts on every token, which it was not trained for.", soft_wrap=True
    )


def _is_manifest(place: str) -> bool:
    """Returns whether a manifest is meant. Raises a FileNotFoundError if its file is missing."""
    if not place.endswith((".toml", ".json")) or Path(place).is_dir():
        return False
    if not Path(place).is_file():
        raise FileNotFoundError(
            f"there is no manifest {place}: give the path of a file with [adapters], then name = location, one a line"
        )
    return True


def _named(places: list[str], by_folder: bool = False) -> dict[str, str]:
    """Returns name -> location for a list of manifests, folders and Hub ids.

    Args:
        by_folder: name a folder by the last part of its path instead of the whole path
    """
    from preft_core.hub.manifest import name_fault, read_manifest
    from preft_core.hub.source import hub_id

    found: dict[str, str] = {}
    for place in places:
        repository = hub_id(place)
        if _is_manifest(place):
            several = read_manifest(place)
        elif repository is not None:
            several = {repository[0]: place}
        else:
            several = {os.path.basename(os.path.abspath(place)) if by_folder else place: place}
            fault = name_fault(next(iter(several))) if by_folder else None
            if fault:
                raise ValueError(
                    f"{place!r} would be named by the last part of its path, and a name is {fault}: give a manifest "
                    "that names it"
                )
        twice = sorted(found.keys() & several.keys())
        if twice:
            both = ", ".join(f"{name} ({found[name]} and {several[name]})" for name in twice)
            raise ValueError(f"{both} is named twice: name each adapter once, or give names in a manifest")
        found |= several
    return found


def _say(message: str) -> None:
    Console(stderr=True).print(f"preft: {message}", markup=False, highlight=False, soft_wrap=True)
