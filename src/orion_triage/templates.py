"""Text from Jinja templates; a missing value is an error."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any


def fill(
    package: str,
    name: str,
    /,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    finalize: Callable[[Any], Any] | None = None,
    **values: Any,
) -> str:
    """The rendered template `name` from the folder of `orion_triage.<package>`; only HTML is escaped.

    `finalize` is applied to each value before it is written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("orion_triage", package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=name.endswith(".html.j2"),
        finalize=finalize,
    )
    usual: dict[str, Callable[..., Any]] = {
        "percent": percent,
        "megabytes": lambda size: f"{size / 1e6:,.1f} MB",
        "median": statistics.median,
    }
    environment.filters.update({**usual, **(filters or {})})
    return environment.get_template(name).render(values)


def percent(value: float | None) -> str:
    """A share as a percentage; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"
