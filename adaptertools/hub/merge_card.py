"""The card of a merge that goes to the Hub as it is made: its record says what the card is to say."""

from pathlib import Path

from adaptertools.containers.checkpoint import CONFIG
from adaptertools.containers.jsonfile import read_json
from adaptertools.hub.commit import Commit
from adaptertools.hub.provenance import merge_facts, merge_sources
from adaptertools.hub.push import model_card
from adaptertools.merging import record


def merge_card(commit: Commit, result: Path, *, token: str | None) -> str:
    """The card beside a merged model; the prose of one that stands in the repository is kept.

    Licence, languages and datasets are those of the cards of base and adapters, at the commits that were merged.

    Raises: HubError; DamagedFileError if the metadata of the card that stands there cannot be read
    """
    document = read_json(result / record.NAME)
    config = read_json(result / CONFIG) if (result / CONFIG).is_file() else {}
    facts = merge_facts(document, config, commit.address.repo_id.rpartition("/")[2])
    return model_card(commit, facts, sources=merge_sources(document), token=token)[0]
