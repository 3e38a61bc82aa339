"""One call each: read, write and convert adapters, for a path, an address on the Hub, or tensors in memory.

What few ask for, `checking`, is a module to import: it loads what is known of all consumers.
"""

from adaptertools.api.comparing import diff
from adaptertools.api.conversion import convert
from adaptertools.api.models import estimate, merge_into, plan_merge, verify_merge
from adaptertools.api.places import Given, as_destination, localize, localize_all
from adaptertools.api.pushing import push
from adaptertools.api.reading import (
    detect,
    from_state_dict,
    oddities,
    open_base,
    option_types,
    read,
    read_options,
    reads_with,
)
from adaptertools.api.reading_back import delta_error_of
from adaptertools.api.sending import check_there
from adaptertools.api.writing import (
    WriteReport,
    give_up,
    stored_size,
    to_state_dict,
    without,
    write,
    write_options,
)
from adaptertools.hub.pull import pull

__all__ = [
    "Given",
    "WriteReport",
    "as_destination",
    "check_there",
    "convert",
    "delta_error_of",
    "detect",
    "diff",
    "estimate",
    "from_state_dict",
    "give_up",
    "localize",
    "localize_all",
    "merge_into",
    "oddities",
    "open_base",
    "option_types",
    "plan_merge",
    "pull",
    "push",
    "read",
    "read_options",
    "reads_with",
    "stored_size",
    "to_state_dict",
    "verify_merge",
    "without",
    "write",
    "write_options",
]
