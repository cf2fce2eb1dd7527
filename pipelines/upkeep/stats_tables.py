"""What `stats` prints: tables of a store's tables, its latest runs, and how runs changed."""

from __future__ import annotations

from typing import Any

from pipelines.errors import counted
from pipelines.running.terminal import printable


def print_stats(result: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table("table", "rows", "files", "MB", title=result.store, title_justify="left")
    for name in ("images", "patches", "failures"):
        table.add_row(name, f"{getattr(result, name):,}", f"{result.files[name]:,}", f"{result.bytes[name] / 1e6:,.1f}")
    for kind, of_kind in result.results.items():
        for name, found in of_kind.items():
            files, size = (f"{found['files']:,}", f"{found['bytes'] / 1e6:,.1f}") if "files" in found else ("", "")
            table.add_row(f"{kind}/{name}", result.described[f"{kind}/{name}"], files, size)
    console.print(table)
    model, features = result.spec["model"], result.spec["features"]
    console.print(
        f"{model['name']} ({model['weights'][:19]}), {features['facet']} of layer {features['layer']}, "
        f"{result.spec['store']['dtype']}; {counted(result.labels, 'label')}; "
        f"{result.bytes_per_image or 0:,.0f} bytes an image",
        highlight=False,
    )
    for reason, count in result.failures_by_reason.items():
        console.print(f"  {count:,} failed: {printable(reason)}", markup=False, highlight=False)
    runs = Table("run", "status", "extracted", "failed", "images/s", "device", title="runs", title_justify="left")
    for run in result.runs[-10:]:
        values = [run.get(key) for key in ("run_id", "status", "extracted", "failed", "images_per_second", "device")]
        runs.add_row(*("" if value is None else escape(printable(str(value))) for value in values))
    console.print(runs)
    if result.trends:
        _print_trends(console, result)


def _print_trends(console: Any, result: Any) -> None:
    """The last runs that did something; in brackets the change from the median of comparable ones before."""
    from rich.table import Table

    def shown(trend: dict[str, Any], key: str, form: str) -> str:
        if (value := trend[key]) is None:
            return ""
        change = trend["change"].get(key)
        if change is None:
            return format(value, form)
        # a fraction of what is usually 0 would say nothing
        points = key == "failed_fraction"
        return f"{format(value, form)} ({change * 100:+.1f} points)" if points else f"{value:{form}} ({change:+.0%})"

    columns = {"per_second": ",.1f", "failed_fraction": ".1%", "bytes_per_image": ",.0f", "seconds": ",.1f"}
    headings = ("run", "job", "device", "work", "a second", "failed", "bytes/image", "seconds", "compared with")
    table = Table(*headings, title="trends (change)", title_justify="left")
    for trend in result.trends[-8:]:
        work = "" if trend["work"] is None else counted(round(trend["work"]), trend["of"].removesuffix("s"))
        values = [shown(trend, key, form) for key, form in columns.items()]
        peers = counted(trend["peers"], "run") if trend["peers"] else ""
        table.add_row(trend["run_id"], trend["job"], trend["device"], work, *values, peers)
    console.print(table)
    for sentence in result.moved:
        console.print(sentence, markup=False, highlight=False)
