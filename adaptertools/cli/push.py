"""`adaptertools push`: an adapter or a model goes to the Hub."""

from typing import TYPE_CHECKING, Any

import click

from adaptertools.cli.options import FORMAT, Output, Reading, output_options, reading_options

if TYPE_CHECKING:
    from adaptertools.containers.source import Located
    from adaptertools.hub.push import PushReport


@click.command("push", short_help="Send an adapter or a model to the Hub.")
@click.argument("src")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--branch", metavar="B", help="Branch of REPO; made if missing. [default: main]")
@click.option("--message", metavar="M", help="Title of the commit.")
@click.option("--to", type=FORMAT, help="Convert the adapter to this format first.")
@click.option("--drop", multiple=True, metavar="KIND", help="Give up what --to cannot carry, as dora; repeatable.")
@click.option("--dry-run", is_flag=True, help="List what would go, and send nothing.")
@reading_options()
@output_options()
def command(src: str, repo: str, branch: str | None, reading: Reading, output: Output, **options: Any) -> None:
    """Send SRC, an adapter or a model, merged or not, to the repository REPO on the Hub, with a model card.

    Large files go first, then everything in one commit. What stands there already is not sent again. Only the files of
    the format go, with tokenizer, licence and README.md where these stand beside them; what stays here is named.
    """
    from adaptertools.api import pushing
    from adaptertools.cli._progress import progress

    address = pushing.destination(repo, branch)  # a wrong one is said before anything is read
    with progress("download", output) as on_progress:
        place = pushing.source_place(src, revision=reading.revision, token=reading.token, on_progress=on_progress)
    with progress("push", output) as on_progress:
        report = pushing.push(
            place,
            address,
            token=reading.token,
            allow_nonfinite=reading.allow_nonfinite,
            read_options=_read_options(reading, place),
            on_progress=on_progress,
            **options,
        )
    output.show(lambda: _text(place.label, report), lambda: _document(place.label, report))


def _read_options(reading: Reading, place: "Located") -> dict[str, Any]:
    """The options for reading an adapter; a model takes none."""
    from adaptertools.containers.source import Source
    from adaptertools.hub.contents import holds_model

    asked = reading.source_format or reading.source_alpha is not None or reading.slots or reading.base
    if not asked and not reading.in_options and holds_model(Source(place)):
        return {}
    return reading.arguments(place)


def _text(src: str, report: "PushReport") -> str:
    from adaptertools.cli._report import count, few, field, size

    what = report.format or "model"
    sent = f"{count(len(report.sent), 'file')}, {size(report.nbytes)}"
    if report.dry_run:
        new = ", a new repository" if report.created else ""
        lines = [f"Would push {src} to {report.address} ({what}){new}; nothing was sent"]
    elif not report.changed:
        lines = [f"{report.address} holds {src} ({what}) already; nothing was sent"]
    else:
        lines = [f"Pushed {src} to {report.address} ({what})"]
    if report.sha:
        lines.append(field("commit", report.sha))
    lines.append(field("page", report.pull_request or report.url))
    if report.changed:
        lines.append(field("would send" if report.dry_run else "sent", sent))
        lines += [f"    {size(nbytes):>9}  {path}" for path, nbytes in report.sent]
    if report.unchanged:
        lines.append(field("unchanged", few(report.unchanged, 4)))
    if report.removed:
        lines.append(field("removed", few(report.removed, 4)))
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.left_out:
        by_reason.setdefault(reason, []).append(name)
    lines += [field("left out", f"{few(names, 4)} ({reason})") for reason, names in by_reason.items()]
    return "\n".join([*lines, *(field("note", note) for note in report.notes)])


def _document(src: str, report: "PushReport") -> dict[str, Any]:
    return {
        "source": {"path": src, "format": report.format},
        "destination": {
            "address": str(report.address),
            "repository": report.address.repo_id,
            "commit": report.sha,
            "url": report.url,
            "pull_request": report.pull_request,
            "created": report.created,
        },
        "dry_run": report.dry_run,
        "changed": report.changed,
        "sent": [{"path": path, "nbytes": nbytes} for path, nbytes in report.sent],
        "nbytes": report.nbytes,
        "unchanged": list(report.unchanged),
        "removed": list(report.removed),
        "left_out": [{"name": name, "reason": reason} for name, reason in report.left_out],
        "notes": list(report.notes),
    }
