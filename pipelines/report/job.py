"""report: what is in a store, to look at, as one HTML file that needs nothing else; and the same plots as PNG files."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines import storage
from pipelines.errors import RequestError
from pipelines.jobs import REPORT_IN_STORE
from pipelines.report.choose import choose
from pipelines.report.contents import Results, read_contents
from pipelines.report.page import make_page
from pipelines.report.sheets import make_sheets
from pipelines.running.outputs import write_output
from pipelines.running.reports import JobResult, new_run_id, recorded
from pipelines.settings.sections import Config
from pipelines.store.store import Store


@dataclass
class Result(JobResult):
    """What a report shows and where it is, or would be.

    how: in which way the images were chosen. without_photo: how many of them have an
    original that is gone or cannot be read. plots: the PNG files.
    """

    output: str
    images: int = 0
    how: str = ""
    without_photo: int = 0
    sections: list[str] = field(default_factory=list)
    bytes: int = 0
    plots: list[str] = field(default_factory=list)


def run(
    config: Config,
    *,
    store: str,
    output: str | None = None,
    sample: int | None = None,
    images: str | Sequence[str] | None = None,
    query: str | None = None,
    png: str | None = None,
    dry_run: bool = False,
) -> Result:
    """Make the report of a store. It reads tables and photos; no model runs, and nothing else in the store changes.

    output: file or URI, default STORE/report.html. sample: how many images. images: image_ids, or files that list some.
    query: SQL that chooses them. png: a folder or URI that the plots are written to besides.

    Raises RequestError for images, queries and settings that the store cannot answer, JobError for damaged tables and
    for places that cannot be written.
    """
    started = time.monotonic()
    opened = Store.open(store, config)
    target = storage.normalise(output) if output else storage.join(opened.uri, REPORT_IN_STORE)
    if not target.lower().endswith((".html", ".htm")):
        raise RequestError(
            f"The report is an HTML file, but --output is {output}: give a name such as {REPORT_IN_STORE}."
        )
    results = Results.of(opened)
    named = [images] if isinstance(images, str) else list(images or ())
    parts, matches = results.parts.values(), results.matches.values()
    choice = choose(opened, config.report, sample, named, query, parts, matches)
    result = Result(new_run_id(), opened.uri, target, len(choice.rows), choice.how, messages=choice.messages)
    if dry_run:
        return result.ended("dry_run", started)
    with recorded(None, result, started):
        contents = read_contents(opened, config, choice, results)
        result.without_photo = contents.without_photo
        page = make_page(contents)
        result.sections, result.bytes = page.sections, len(page.html)
        write_output(target, page.html, config.storage.options)
        if png is not None:
            for name, data in make_sheets(contents):
                result.plots.append(storage.join(storage.normalise(png), name))
                write_output(result.plots[-1], data, config.storage.options)
    return result
