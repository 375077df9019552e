"""The commands `mqworker artifact ...`: import, list, show, get."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from mqworker.errors import SubmitterError
from mqworker.rehearsal import Given
from mqworker.screen import artifact_page, artifact_table
from mqworker.shell import AsJson, Shell, print_json, read_object, show

application = typer.Typer(help="Import, list, show and get artifacts.", no_args_is_help=False)

FULL_ID_LENGTH: Final = 36
DEBIAN_SUFFIXES: Final = frozenset({".dsc", ".changes", ".deb", ".udeb"})

ArtifactId = Annotated[int, typer.Argument(metavar="ID", help="An artifact's number.", show_default=False)]


@application.command("import")
def import_(
    context: typer.Context,
    *,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="A .dsc, .changes or .deb, or any files.")],
    category: Annotated[str | None, typer.Option(help="For any files: what they are, like site:notes.")] = None,
    name: Annotated[str | None, typer.Option(help="For any files: what to call them together.")] = None,
    data: Annotated[str | None, typer.Option(metavar="JSON", help="For any files: what to say of them.")] = None,
    as_json: AsJson = False,
) -> None:
    """Import files as artifacts: a .dsc, .changes or .deb as what it is, other files together as one.

    What a .dsc or .changes names is taken along and checked.
    """
    if readable := [path for path in files if path.suffix in DEBIAN_SUFFIXES]:
        if len(readable) < len(files) or category or name or data:
            raise SubmitterError("expected Debian files alone, without --category, --name and --data; got a mixture")
        given = [read_debian(path) for path in files]
    else:
        if category is None or name is None:
            raise SubmitterError(
                f"expected --category and --name for {files[0]}: only Debian files speak for themselves"
            )
        given = [_plain(files, category, name, read_object(data or "{}", "--data"))]
    shell: Shell = context.obj
    with shell.client() as client:
        artifacts = [client.import_artifact(one.category, one.name, one.data, one.files) for one in given]
    print_json(artifacts) if as_json else show(artifact_table(artifacts))


@application.command("list")
def list_(
    context: typer.Context,
    *,
    request: Annotated[str | None, typer.Option(metavar="ID", help="Only those that this request made.")] = None,
    category: Annotated[str | None, typer.Option(help="Only those of this category.")] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=10000, help="At most so many.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List artifacts, newest first."""
    shell: Shell = context.obj
    with shell.client() as client:
        if request is not None and len(request) < FULL_ID_LENGTH:
            request = client.status(request).request.id
        artifacts = client.artifacts(request=request, category=category, limit=limit)
    print_json(artifacts) if as_json else show(artifact_table(artifacts))


@application.command("show")
def show_(context: typer.Context, *, number: ArtifactId, as_json: AsJson = False) -> None:
    """Show one artifact: its files, its data, and how it belongs to others."""
    shell: Shell = context.obj
    with shell.client() as client:
        [artifact] = client.artifacts(ids=[number])
    print_json(artifact) if as_json else show(artifact_page(artifact))


@application.command("get")
def get(
    context: typer.Context,
    *,
    number: ArtifactId,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Where to; default: artifact-ID here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Get an artifact's files, checked against their sha256, and print their paths."""
    shell: Shell = context.obj
    with shell.client() as client:
        paths = client.fetch_artifact(number, output or Path(f"artifact-{number}"))
    if as_json:
        print_json([str(path) for path in paths])
    else:
        for path in paths:
            typer.echo(str(path))


def _plain(files: list[Path], category: str, name: str, data: Mapping[str, Any]) -> Given:
    names = [path.name for path in files]
    if len(set(names)) < len(names):
        raise SubmitterError(f"expected files of different names, got {', '.join(sorted(names))}")
    return Given(category=category, name=name, data=data, files=dict(zip(names, files, strict=True)))


def read_debian(path: Path) -> Given:
    """Read a .dsc, .changes, .deb or .udeb, and check what it names.

    Raises:
        ArtifactInvalid: it is not what it should be; the text says what is wrong.
        HostUnfit: python-debian is not installed.
    """
    from tasks import debian  # noqa: PLC0415  # a stray `tasks.py` must not break the other commands

    readers = {".dsc": debian.read_source_package, ".changes": debian.read_upload}
    read = readers.get(path.suffix, debian.read_binary_package)(path)
    return Given(category=read.category, name=read.name, data=read.data, files=read.files)
