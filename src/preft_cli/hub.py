"""`preft push | pull | verify | convert | export`: adapters between this machine, the Hub and plain LoRA."""

import json as format
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Token for the Hub; else that of your login.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def push(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of saved adapters.")],
    to: Annotated[str, typer.Option(help="org/name; for several adapters the org, each under its folder's name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    subfolder: Annotated[str, typer.Option(help="Folder in the repository.")] = "",
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload prefill-only adapter",
    token: Token = None,
    json: Json = False,
) -> None:
    """Check adapters and commit each with a model card to the Hub."""
    from preft_core.hub import push_adapter

    if len(adapters) > 1 and "/" in to:
        raise ValueError(
            f"--to is {to!r} for {len(adapters)} adapters: give the org alone; each is named by its folder"
        )
    made: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), disable=len(adapters) == 1) as progress:
        for folder in progress.track(adapters, description="push"):
            target = to if len(adapters) == 1 else f"{to}/{folder.resolve().name}"
            pushed = push_adapter(
                folder,
                target,
                token=token,
                private=private or None,
                revision=revision,
                create_pr=create_pr,
                subfolder=subfolder,
                commit_message=message,
            )
            made.append(dict(vars(pushed)))
    if json:
        print(format.dumps(made, indent=1))
        return
    for facts in made:
        print(f"{facts['repository']}@{facts['commit']}  {facts['pull_request'] or facts['url']}")


def pull(
    places: Annotated[
        list[str], typer.Argument(help="org/name, org/name@revision, or a manifest such as preft.toml.")
    ],
    output: Annotated[Path | None, typer.Option(help="Folder; for several adapters one folder each in it.")] = None,
    pin: Annotated[Path | None, typer.Option(help="Write a manifest with the commits that were found.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Downloads at once.")] = 8,
    token: Token = None,
    json: Json = False,
) -> None:
    """Download adapters, check them, and say where they are."""
    from preft_core.hub import pinned, pull_adapters
    from preft_core.manifest import write_manifest

    adapters = _named(places)
    if len(adapters) == 1 and output is not None and not _is_manifest(places[0]):
        adapters, output = {output.name: places[0]}, output.parent
    console = Console(stderr=True)
    with Progress(console=console, disable=len(adapters) == 1) as progress:
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
        console.print(f"preft: {one.name}: {one.error}", markup=False, highlight=False, soft_wrap=True)
    if pin is not None and not failed:
        write_manifest(pin, pinned(found))
    if failed:
        raise typer.Exit(1)


def verify(
    adapters: Annotated[list[str], typer.Argument(help="Folders, Hub ids, or a manifest.")],
    base: Annotated[str | None, typer.Option(help="Base model to try them on: Hub id or folder.")] = None,
    token: Token = None,
    json: Json = False,
) -> None:
    """Run every check of the format, and with --base a self-test: does it fit, does decoding stay the base model's?"""
    from preft_core.adapter import AdapterError
    from preft_core.hub import pull_adapter

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
        except AdapterError as error:
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
    """Make a prefill-only adapter of a plain LoRA: the same weights, another meaning."""
    from preft_core.transform import from_lora

    print(from_lora(lora, output))
    Console(stderr=True).print(
        "The LoRA was trained to act on every token and now acts on prompt tokens alone: expect it to do less. Train "
        "it on with `preft train`, or make it with `preft distill`, before you serve it.",
        soft_wrap=True,
    )


def export(
    adapter: Annotated[Path, typer.Argument(help="Folder of a LoRA-P adapter.")],
    output: Annotated[Path, typer.Option(help="Folder for the plain LoRA.")],
) -> None:
    """Write a LoRA-P adapter under plain PEFT LoRA names: whoever loads it applies it to every token."""
    from preft_core.transform import to_lora

    to_lora(adapter, output)
    Console(stderr=True).print(
        "Written as a plain LoRA: it now acts on every token, for which it was not trained.", soft_wrap=True
    )


def _is_manifest(place: str) -> bool:
    return place.endswith((".toml", ".json")) and Path(place).is_file()


def _named(places: list[str]) -> dict[str, str]:
    """Returns name -> place for manifests, folders and Hub ids given one after the other."""
    from preft_core.manifest import read_manifest

    found: dict[str, str] = {}
    for place in places:
        several = read_manifest(place) if _is_manifest(place) else {place.split("@")[0].rstrip("/"): place}
        twice = sorted(found.keys() & several.keys())
        if twice:
            raise ValueError(f"{', '.join(twice)} is named twice: name each adapter once")
        found |= several
    return found
