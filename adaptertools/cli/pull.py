"""`adaptertools pull`: an adapter or a model of the Hub comes to this machine."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import Output, output_options, revision_option, token_option

if TYPE_CHECKING:
    from adaptertools.hub.pull import PullReport


@click.command("pull", short_help="Fetch an adapter or a model from the Hub.")
@click.argument("repo")
@click.argument("dst", required=False)
@revision_option()
@token_option()
@click.option("--allow-pickle", is_flag=True, help="Fetch torch files too where there is nothing else.")
@click.option("--copy", is_flag=True, help="Copy weights to DST where they would be linked.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is an adapter or a model.")
@output_options()
def command(
    repo: str,
    dst: str | None,
    revision: str | None,
    token: str | None,
    allow_pickle: bool,
    copy: bool,
    overwrite: bool,
    output: Output,
) -> None:
    """Fetch the adapter or the model REPO to the folder DST; without DST only to the cache of all Hugging Face tools.

    REPO is org/name, org/name@revision, hf://org/name@revision/sub/folder or a web address of the Hub. Only the files
    that are needed are fetched, all of one commit. A stopped download is gone on with by the same command.
    """
    from adaptertools.cli._progress import progress
    from adaptertools.hub.pull import pull

    with progress("pull", output) as on_progress:
        report = pull(
            repo,
            dst,
            revision=revision,
            token=token,
            allow_pickle=allow_pickle,
            copy=copy,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    output.show(lambda: _text(report), lambda: _document(report))


def _text(report: "PullReport") -> str:
    from adaptertools.cli._report import count, few, field, size

    kind = report.format or report.what
    lines = [
        f"Pulled {report.address} ({kind}) to {report.path}",
        field("commit", report.sha),
        field("files", f"{size(report.nbytes)} in {count(len(report.files), 'file')}: {few(list(report.files), 4)}"),
        field("fetched", _fetched(report)),
    ]
    if report.linked:
        lines.append(field("linked", f"to the cache, and so read-only: {few(report.linked, 4)}; --copy makes copies"))
    if report.left_out:
        lines.append(field("left there", f"{len(report.left_out)}: {few(report.left_out, 4)}"))
    return "\n".join([*lines, *(field("note", note) for note in report.notes)])


def _fetched(report: "PullReport") -> str:
    from adaptertools.cli._report import size

    if not report.fetched:
        return "nothing; all of it was in the cache"
    return f"{size(report.fetched)}{'' if report.fetched == report.nbytes else '; the rest was in the cache'}"


def _document(report: "PullReport") -> dict[str, Any]:
    return {
        "source": {"address": str(report.address), "repo": report.address.repo_id, "sha": report.sha},
        "destination": {"path": str(report.path), "nbytes": report.nbytes},
        "what": report.what,
        "format": report.format,
        "files": report.files,
        "fetched": report.fetched,
        "linked": list(report.linked),
        "left_out": list(report.left_out),
        "offline": report.offline,
        "notes": list(report.notes),
    }
