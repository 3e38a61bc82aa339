"""What takes a base model or a merged one, for addresses on the Hub too; without them, it is what stands below."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from adaptertools.api.places import localize
from adaptertools.hub.address import as_address
from adaptertools.merging import memory, plan, verify
from adaptertools.operations import estimate as estimation

__all__ = ["estimate", "merge_into", "plan_merge", "verify_merge"]

P = ParamSpec("P")
R = TypeVar("R")


def _for_addresses(function: Callable[P, R], *models: str, headers: bool = False) -> Callable[P, R]:
    """The function, whose arguments of these names may be addresses of models on the Hub."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        given = signature.bind(*args, **options)
        for name in models:
            address = as_address(given.arguments.get(name))
            if address is not None:
                given.arguments[name] = localize(address, "model", headers=headers)
        return function(*given.args, **given.kwargs)

    return call


estimate = _for_addresses(estimation.estimate, "base", headers=True)
plan_merge = _for_addresses(plan.plan_merge, "base")
verify_merge = _for_addresses(verify.verify_merge, "base", "merged")
merge_into = _for_addresses(memory.merge_into, "keep")
