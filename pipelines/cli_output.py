"""What commands print: plain sentences and tables for people, or JSON.

The printers of results are given results without secrets (`hidden_in`); what else is printed goes through `say`
(pipelines.running.terminal).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from rich.filesize import decimal

from pipelines.errors import counted
from pipelines.running.terminal import printable
from pipelines.upkeep.stats_tables import print_stats as print_stats

ELSEWHERE = "done by another run at the same time"


def printer_of(command: str) -> Callable[[Any], None]:
    """What prints the result of a command; for one without a printer of its own, its counts."""
    return globals().get(f"print_{command.replace(' ', '_')}", print_counts)


def print_counts(result: Any) -> None:
    """Print every count and text of a result, a line each."""
    for name, value in result.as_dict().items():
        if name not in ("messages", "seconds", "exit_code") and isinstance(value, str | int | float) and value != "":
            shown = f"{value:,}" if isinstance(value, int | float) else printable(value)
            print(f"{name.replace('_', ' ')}: {shown}")


def print_settings(config: Any) -> None:
    """Every setting, its value and what it does."""
    values = config.without_secrets()
    for section in type(config).model_fields:
        print(f"\n{section}:")
        for key, about in type(getattr(config, section)).model_fields.items():
            print(f"  {key}: {json.dumps(values[section][key])}\n      {about.description}")


def print_extract(result: Any) -> None:
    if result.status == "dry_run":
        listed = counted(result.listed, "image")
        print(f"\n{listed} listed: {result.pending:,} to extract ({result.changed:,} of them changed),")
        print(f"{result.already_done:,} done, {result.failed_before:,} recorded as failures. Nothing was written.")
        return
    lines = [f"{counted(result.listed, 'image')} in INPUT, {_were_done(result)}", f"{result.extracted:,} extracted"]
    if result.extracted:
        lines[-1] += f" at {result.images_per_second:,.1f} a second"
    print(_sentence(lines, {"removed": result.pruned, ELSEWHERE: result.done_elsewhere}))
    if result.failed:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(result.failures_by_reason.items()))
        print(f"{result.failed:,} could not be extracted ({reasons}): see {result.store}/failures.")
    if result.failed_before:
        was, them = ("was", "it") if result.failed_before == 1 else ("were", "them")
        print(f"{result.failed_before:,} failed before and {was} not tried again (--retry-failed tries {them}).")
    print(f"Tables: {result.store}/images  {result.store}/patches  {result.store}/failures")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.status}, {result.total_seconds:.1f} s)")


def _sentence(counts: list[str], others: dict[str, int]) -> str:
    """Counts in a sentence; of the others, only those that are not 0."""
    return ", ".join([*counts, *(f"{count:,} {what}" for what, count in others.items() if count)]) + "."


def _were_done(result: Any) -> str:
    return f"{result.already_done:,} {'was' if result.already_done == 1 else 'were'} done"


def print_estimate(result: Any) -> None:
    print(f"{counted(result.listed, 'image')} in INPUT, {result.images:,} of them not in {result.store}")
    if not result.images:
        return
    read = f"{decimal(result.source_bytes)} to read, " if result.source_bytes is not None else ""
    tables = ", ".join(f"{name} {decimal(size)}" for name, size in result.bytes.items())
    each = decimal(round(result.bytes_per_image))
    print(f"{read}{decimal(sum(result.bytes.values()))} to store ({tables}; {each} an image)")
    patches = counted(result.patches, "patch", "patches")
    print(f"{patches}; {result.gflop_per_image:,.2f} GFLOP an image, {result.tflop:,.1f} TFLOP in all")
    measured = f"measured on {counted(result.sample, 'image')}"
    start = f"{result.start_seconds:,.0f} s of it to start"
    rate = f"{result.images_per_second:,.1f} images/s"
    print(f"here ({result.device}): {rate}, {_hours(result.hours)}, {start} ({measured})")
    if result.named_device:
        rate = f"about {result.named_images_per_second:,.0f} images/s (the {result.named_limited_by} limits)"
        print(f"{result.named_device}: {rate}, {_hours(result.named_hours)}")
    if result.cost is not None:
        cost = f"{result.cost:,.2f}; {result.cost_per_million:,.2f} a million"
        print(f"cost at {result.price_per_hour:g} an hour: {cost}")


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"


def print_cluster(result: Any) -> None:
    uri = f"{result.store}/clusters/{result.name}"
    vectors, clusters = _vectors(result.vectors, result.of), counted(result.k, "cluster")
    if result.status == "dry_run":
        if result.what == "update":
            print(f"\n{counted(result.added, 'image')} to assign, {result.removed:,} to take out. Nothing was written.")
            return
        again = f", continuing after iteration {result.resumed_from}" if result.resumed_from else ""
        print(f"\n{vectors} of {counted(result.images, 'image')} to {clusters}{again}.")
        print("Nothing was written.")
        return
    if result.status == "unchanged":
        print(f"The clusters {result.name} are up to date: nothing to do.")
    elif result.what == "update":
        drift = f"; mean distance {result.drift:.3f} times that of the training" if result.drift else ""
        print(f"{counted(result.added, 'image')} assigned, {result.removed:,} taken out{drift}.")
    elif result.status == "done":
        trained_on = _vectors(result.trained_on, result.of)
        print(f"{counted(result.iterations, 'iteration')} over {trained_on}: objective {result.objective:.6g}.")
    empty = f", {result.empty:,} empty" if result.empty else ""
    print(f"{vectors} in {clusters}, the largest has {result.largest:,}{empty}.")
    print(f"Tables: {uri}/centroids  {uri}/assignments ({result.total_seconds:.1f} s)")


def _vectors(count: int, of: str) -> str:
    """How many patches or embeddings."""
    return counted(count, "patch", "patches") if of == "patches" else counted(count, of.removesuffix("s"))


def print_train(result: Any) -> None:
    of = f"{counted(result.images, 'image')}, {counted(result.epochs, 'epoch')}, {counted(result.steps, 'step')}"
    if result.status == "dry_run":
        again = f", continuing after step {result.resumed_from:,}" if result.resumed_from else ""
        print(f"\n{result.model} on {of}{again}. Nothing was written.")
        return
    if result.status == "unchanged":
        print(f"The training is complete ({of}): nothing to do.")
    else:
        rate = f" at {result.images_per_second:,.1f} images/s" if result.images_per_second else ""
        loss = f"; loss {result.loss:.3f}" if result.loss is not None else ""
        workers = counted(result.workers, "worker")
        print(f"{of}: {counted(result.steps_done, 'step')} done{rate} ({result.device}, {workers}){loss}.")
    if result.knn_accuracy is not None:
        print(f"k-NN accuracy {result.knn_accuracy:.1%}.")
    if result.unreadable:
        print(f"{counted(result.unreadable, 'image')} could not be read: {result.store}/unreadable.jsonl")
    if result.steps_done >= result.steps:
        print(f"Weights: {result.weights}  card: {result.store}/README.md  log: {result.store}/log")
        print(f"Use: {result.use}")


def print_cosegment(result: Any) -> None:
    images = f"{counted(result.images, 'image')} in {counted(result.sets, 'set')} ({result.source})"
    counts = f"{images}: {_were_done(result)}"
    if result.status == "dry_run":
        print(
            f"\n{counts}, {result.pending:,} to segment in {counted(result.pending_sets, 'set')}, "
            f"{result.outdated:,} outdated. Nothing was written."
        )
        return
    lines = [counts, f"{result.segmented:,} segmented"]
    if result.segmented:
        lines[-1] += f" at {result.images_per_second:,.1f} a second"
    others = {"of them without a part": result.without_foreground, "with a note": result.noted}
    others |= {"removed because of a changed set": result.outdated, ELSEWHERE: result.done_elsewhere}
    print(_sentence(lines, others))
    if result.exported:
        print(f"{counted(result.exported, 'file')} of masks and overlays written.")
    print(f"Tables: {result.store}/parts/{result.name}/images  {result.store}/parts/{result.name}/patches")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.status}, {result.total_seconds:.1f} s)")


def print_index(result: Any) -> None:
    added, rest = counted(result.added, "image"), f"{result.changed:,} changed, {result.removed:,} removed"
    if result.status == "dry_run":
        print(f"\n{added} to add, {rest}. Nothing was written.")
        return
    if result.status == "unchanged":
        print(f"The index {result.name} is up to date: nothing to do.")
    else:
        again = f", built again from scratch since {result.rebuilt}" if result.rebuilt else ""
        print(f"{added} added, {rest}{again} ({result.total_seconds:.1f} s).")
    print(f"Kind {result.kind}: {result.why}.")
    dead = f", space of {counted(result.dead, 'removed vector')} included" if result.dead else ""
    vectors = f"{counted(result.count, 'vector')} of {counted(result.images, 'image')}"
    print(f"{vectors}, {result.memory_bytes / 1e6:,.1f} MB{dead}.")
    print(f"Index: {result.store}/index/{result.name}")


def print_search(result: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    patches = result.of == "patches"
    table = Table("", "similarity", "image_id", "label", *(("row", "col", "y", "x") if patches else ()))
    for rank, row in enumerate(result.results, 1):
        place = [str(row["row"]), str(row["col"]), f"{row['y']:.1f}", f"{row['x']:.1f}"] if patches else []
        names = (escape(printable(row.get(name) or "")) for name in ("image_id", "label"))
        table.add_row(str(rank), f"{row['similarity']:.4f}", *names, *place)
    Console().print(table)
    if result.saved:
        print(f"Picture: {result.saved}")


def print_correspond(result: Any) -> None:
    pairs = f"{counted(result.pairs, 'pair')} of {counted(result.images, 'image')} ({result.source})"
    counts = f"{pairs}: {_were_done(result)}"
    if result.status == "dry_run":
        print(f"\n{counts}, {result.pending:,} to match, {result.outdated:,} outdated. Nothing was written.")
        return
    lines = [counts, f"{result.matched:,} matched"]
    if result.matched:
        lines[-1] += f" at {result.pairs_per_second:,.1f} a second, {counted(result.matches, 'match', 'matches')}"
    others = {"of the pairs without any (kept = 0)": result.without_matches}
    others |= {"removed because of changed images": result.outdated, ELSEWHERE: result.done_elsewhere}
    print(_sentence(lines, others))
    print(f"Tables: {result.store}/matches/{result.name}/pairs  {result.store}/matches/{result.name}/matches")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.status}, {result.total_seconds:.1f} s)")


def print_evaluate_pck(result: Any) -> None:
    compared = f"{result.facet} of layer {result.layer}, {'binned' if result.binned else 'plain'}"
    print(f"{counted(result.pairs, 'pair')} of {counted(result.images, 'image')} ({result.layout}), {compared}.")
    print("By pair: the fraction of a pair's points that are right, as a mean over pairs. By point: of all points.")
    width = max(len(score["category"]) for score in result.scores)
    alphas = "".join(f"{f'@{alpha:g}':>8}" for alpha in result.alphas)
    for threshold, meaning in result.thresholds.items():
        print(f"\nPCK by {threshold}: {meaning}")
        print(f"{'':{width}}{'pairs':>8}   {'by pair':{len(alphas)}}   by point")
        print(f"{'':{width}}{'':8}{alphas}   {alphas}")
        for score in result.scores:
            if score["threshold"] == threshold:
                values = ["".join(f"{value:8.3f}" for value in score[mean]) for mean in ("per_pair", "per_point")]
                print(f"{printable(score['category']):{width}}{score['pairs']:8,}{values[0]}   {values[1]}")
    print(f"\nReport: {result.store}/runs/{result.run_id}.json ({result.total_seconds:.1f} s)")


def print_evaluate_retrieval(result: Any) -> None:
    for k, value in result.recall.items():
        print(f"recall@{k:<4} {value:.4f}")
    print(f"mAP         {result.mean_average_precision:.4f}")
    left_out = f"{result.unlabelled:,} without label left out, {result.alone:,} alone with their label"
    queries = f"{counted(result.queries, 'query', 'queries')} among {counted(result.images, 'image')}"
    print(f"{queries}, {counted(result.labels, 'label')} ({left_out}).")
    print("recall@k: the fraction of queries that have an image of the same label among their k nearest by cosine.")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.total_seconds:.1f} s)")


def _print_classification(result: Any) -> None:
    for what, value in result.accuracy.items():
        print(f"{f'k = {what}' if result.task == 'knn' else what:<9} {value:.4f}")
    others = "the others" if result.task == "knn" else "four fifths of the others"
    how = "" if result.test else f", each by {others}"
    left_out = f"{result.unlabelled:,} without label left out"
    if result.unknown:
        left_out += f", {result.unknown:,} of a label that no image to learn from has, counted as wrong"
    tested = f"{counted(result.tested, 'image')}, learnt from {result.learnt_from:,}{how}"
    print(f"top-1 accuracy of {tested} ({left_out}).")
    print(f"{counted(result.labels, 'label')}; answering with the commonest one always: {result.chance:.4f}.")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.total_seconds:.1f} s)")


print_evaluate_knn = print_evaluate_linear = _print_classification


def print_evaluate_segmentation(result: Any) -> None:
    measures = ("jaccard", "precision", "corloc")
    width = max(len(score["set"]) for score in result.scores)
    print(f"{'':{width}}{'images':>8}" + "".join(f"{measure:>11}" for measure in measures))
    for score in result.scores:
        values = "".join(f"{score[measure]:11.4f}" for measure in measures)
        print(f"{printable(score['set']):{width}}{score['images']:8,}{values}")
    for measure in measures:
        print(f"{measure}: {result.conventions[measure]}.")
    if result.resized:
        print(f"{counted(result.resized, 'annotated mask')} of another size resized to that of the image.")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.total_seconds:.1f} s)")


def print_evaluate_parts(result: Any) -> None:
    width = max(len(score["set"]) for score in result.scores)
    items = None
    for score in result.scores:
        if score["items"] != items:
            items = score["items"]
            print(f"{items}: {result.conventions[items]}.")
            print(f"{'':{width}}{'images':>8}{'count':>14}{'NMI':>9}{'ARI':>9}")
        counts = f"{score['images']:8,}{score['count']:14,}"
        print(f"{printable(score['set']):{width}}{counts}{score['nmi']:9.4f}{score['ari']:9.4f}")
    for what in ("nmi", "ari", "set"):
        print(f"{what}: {result.conventions[what]}.")
    print(f"Report: {result.store}/runs/{result.run_id}.json ({result.total_seconds:.1f} s)")


def print_report(result: Any) -> None:
    shown = f"{counted(result.images, 'image')} ({result.how})"
    if result.status == "dry_run":
        print(f"\nwould show {shown} in {result.output}. Nothing was written.")
        return
    gone = f", {result.without_photo:,} without their photo" if result.without_photo else ""
    print(f"{shown}{gone}: {', '.join(result.sections)} ({result.total_seconds:.1f} s).")
    if result.plots:
        print(f"{counted(len(result.plots), 'plot')}: {result.plots[0].rsplit('/', 1)[0]}")
    print(f"Report: {result.output} ({decimal(result.bytes)}); open it in a browser.")


def print_verify(result: Any) -> None:
    for problem in result.problems:
        print(printable(problem))
    if result.problems:
        print(f"{counted(len(result.problems), 'problem')} in {result.store}.", file=sys.stderr)
        return
    patches, failures = counted(result.patches, "patch", "patches"), counted(result.failures, "failure")
    print(f"{result.store} is sound: {counted(result.images, 'image')}, {patches}, {failures}")
    unused = f", and {counted(result.unreferenced_files, 'file')} of older snapshots or unfinished writes (harmless)"
    print(f"in {counted(result.files, 'file')}{unused if result.unreferenced_files else ''}.")


def print_repair(result: Any) -> None:
    for sentence in result.mends:
        print(f"{'would be mended' if result.status == 'dry_run' else 'mended'}: {printable(sentence)}")
    for sentence in result.left:
        print(f"left: {printable(sentence)}")
    for table, rows in result.removed.items():
        if rows:
            print(f"{counted(rows, 'row')} removed from {table}.")
    if result.commands:
        print("To make again what is removed, with the settings that it was made with:")
        for command in result.commands:
            print(f"    {printable(command)}")
    if result.status == "dry_run":
        print("Nothing was written.")
    elif not result.left:
        did = f"{counted(result.mended, 'finding')} mended" if result.mended else "nothing to mend"
        print(f"{result.store} is sound: {did} ({result.total_seconds:.1f} s).")
    else:
        print(f"{counted(len(result.left), 'problem')} left in {result.store}.", file=sys.stderr)


def print_compact(result: Any) -> None:
    if result.status == "dry_run":
        print(
            f"\n{result.merged:,} of {counted(result.files_before, 'file')} would become {result.written:,}; "
            f"{counted(result.vacuumed, 'file')} that no kept snapshot names would be removed. Nothing was written."
        )
        return
    files = f"{result.files_before:,} -> {result.files_after:,}"
    print(f"{counted(result.merged, 'file')} merged into {result.written:,}: {files}.")
    if result.conflicts:
        print(f"{counted(result.conflicts, 'group')} left for the next time: changed by another run meanwhile.")
    print(f"Removed {counted(result.vacuumed, 'file')} that no kept snapshot names ({result.total_seconds:.1f} s).")


def print_run(result: Any) -> None:
    width = max(len(job.title) for job in result.jobs)
    for job in result.jobs:
        why = f"  {job.why}" if job.status in ("failed", "would_run", "would_fail") else ""
        took = f"{job.seconds:8.1f} s" if job.seconds else " " * 10
        print(f"{job.title:{width}}  {job.status:11} {took}{why}")
    if result.status == "dry_run":
        print("Nothing was written.")
        return
    print(f"{result.status} in {result.total_seconds:.1f} s: {result.store}/runs/{result.run_id}.json")
