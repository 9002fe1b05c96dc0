"""The report of a search: `report.md`, and `report.html` with its pictures inside."""

import base64
import html
import io
import math
import shlex
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dae_diffusers.comparison.scripts import words_of
from dae_diffusers.metrics.report import table
from dae_diffusers.search.candidates import stage1_flags
from dae_diffusers.search.search import Search
from dae_diffusers.search.settings import show_seconds
from dae_diffusers.search.trial import distances, guidance_of
from dae_diffusers.store import read_json, write_atomically

_TOLD_APART = 2  # how many times the gFD of one pilot is that of another whose latents are better in full, too
_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:left}img{max-width:100%}code,pre{background:#f4f4f4}"
)


def write_report(search: Search) -> None:
    r"""Writes what a search has found so far; the winner is known once it is trained."""
    results = results_of(search)
    winner = winner_of(search)
    rows = table_of_candidates(search, results)
    texts = [*head_of(search, results, winner), *table("Candidates", rows), *notes(search, results, winner)]
    folder = search.folder
    figures = {
        "frontier.png": ("Reconstruction (rFD) and generation (gap)", frontier(results, winner)),
        "curves.png": ("gFD over the steps of the generators", curves(results)),
    }
    for name, (_, figure) in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, format="png")
        (folder / name).write_bytes(buffer.getvalue())
    pictures = [*((title, folder / name) for name, (title, _) in figures.items()), *grids_of(search, results)]
    links = [
        line for title, path in pictures for line in (f"### {title}", f"![{title}]({path.relative_to(folder)})", "")
    ]
    write_atomically(folder / "report.md", "\n".join([*texts, *links]))
    write_atomically(folder / "report.html", to_html(texts, [(title, path.read_bytes()) for title, path in pictures]))


def results_of(search: Search) -> dict[str, list[dict[str, Any]]]:
    r"""The results of each candidate, rung after rung, as far as they exist."""
    return {name: rows_of(search, name) for name in search.candidates.flags}


def rows_of(search: Search, name: str) -> list[dict[str, Any]]:
    r"""The results of a candidate, rung after rung, as far as they exist."""
    return [read_json(path) for path in sorted(search.trial(name).folder.glob("rung-*/result.json"))]


def winner_of(search: Search) -> str | None:
    path = search.folder / "winner.json"
    return read_json(path)["name"] if path.exists() else None


def head_of(search: Search, results: dict[str, list[dict[str, Any]]], winner: str | None) -> list[str]:
    title = ["# Which latent space?", ""]
    if winner is None:
        return [*title, "The search is not finished. Give the same command again to continue.", ""]
    last = results[winner][-1]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in distances(last).items())
    text = f"**{winner}** is the best of {len(results)} latent spaces, chosen by the gFD of pilots. Its last measurement: {shown}."
    used = f"The search took {show_seconds(search.seconds_used())} of {search.config.budget}."
    return [
        *title,
        text,
        used,
        "",
        "Train it at full length:",
        "",
        "```bash",
        *full_commands(search, winner),
        "```",
        "",
    ]


def full_commands(search: Search, winner: str) -> list[str]:
    r"""The commands that train the winner at full length."""
    flags, data = search.candidates.flags[winner], shlex.join(words_of(search.data))
    vae, lines, kept = flags.get("vae"), [], flags.get("keep_latent_channels")
    if vae is None:
        vae, first = "runs/best/vae", stage1_flags(flags)
        stages = [(first, "--output_dir runs/best")]
        if kept is not None:
            second = {name: value for name, value in first.items() if name != "auxiliary_decoder"}
            stages = [
                (first, "--stage 1 --output_dir runs/ordered"),
                (second, f"--stage 2 --stage1_dir runs/ordered --keep_latent_channels {kept} --output_dir runs/best"),
            ]
        lines += [f"dae-diffusers train-dae {data} {shlex.join(words_of(given))} {rest}" for given, rest in stages]
    generator = shlex.join(words_of(search.candidates.transformer_of(winner)))
    lines.append(f"dae-diffusers train-dit {data} --vae {shlex.quote(vae)} {generator} --output_dir runs/best")
    if any(
        guidance_of(row) for row in rows_of(search, winner)
    ):  # pilots want more guidance than what is trained to the end
        features = shlex.quote(search.config.features or str(search.folder / "features" / "classifier"))
        lines.append(
            f"dae-diffusers evaluate {data} --pipeline runs/best/pipeline --features {features} --guidance_scales 1 1.5 2 3 "
            "--set_defaults --output_dir runs/best/evaluation"
        )
    return lines


def table_of_candidates(search: Search, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    r"""A line for each candidate, the furthest first: how far it came, why it stopped, and its numbers in its last rung."""
    winner, lines = winner_of(search), []
    for name, every in results.items():
        rows = in_rungs(every)
        whole = [row for row in rows if "failed" not in row and "gFD" in distances(row)]
        found = distances(whole[-1]) if whole else {}
        lines.append(
            {
                "candidate": name,
                "rungs": len(rows),
                "end": end_of(name, every, winner),
                **{key: found.get(key) for key in ("PSNR", "rFD", "gFD", "gap")},
                "guidance": guidance_of(whole[-1]) if whole else None,
                "time": show_seconds(math.fsum(row["seconds"] for row in every)) if every else None,
            }
        )
    return sorted(lines, key=lambda line: (-line["rungs"], math.inf if line["gFD"] is None else line["gFD"]))


def in_rungs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""The results of a candidate that can be compared with the others': without the winner's own training, which is longer."""
    return [row for row in rows if row["rung"]["candidates"] > 1] or rows


def end_of(name: str, rows: list[dict[str, Any]], winner: str | None) -> str:
    if rows and "failed" in rows[-1]:
        return f"failed: {rows[-1]['failed'].partition('. ')[0].partition(';')[0]}"
    if winner is None:
        return "not finished"
    return "the winner" if name == winner else f"dropped after rung {len(rows)}"


def notes(search: Search, results: dict[str, list[dict[str, Any]]], winner: str | None) -> list[str]:
    lines = [f"`{name}` was left out: {reason}" for name, reason in search.candidates.left_out.items()]
    if search.config.features is None:
        of = (
            "tell its classes"
            if search.images[0].has_classes
            else "tell by how much an image is turned (there are no classes)"
        )
        lines.append(f"The judge is a small network that was trained on these images to {of}.")
    lines.append(
        "gFD is the distance of a pilot's samples to the images, at the best of the measured guidance scales; rFD is that of "
        "reconstructions, gap that of samples to reconstructions. The table has them after the candidate's last rung. One seed: small "
        "differences mean little."
    )
    if autoencoders_decide([rows for name, rows in results.items() if name != winner]):
        lines.append(
            "**The autoencoders were trained briefly**: rFD is more than a third of gFD, so their training decides and not the latent "
            "space. Search again with a larger `--budget`, or fewer candidates."
        )
    lines += not_told_apart(results, winner, search.candidates.joint)
    return [line for each in lines for line in (each, "")]


def not_told_apart(results: dict[str, list[dict[str, Any]]], winner: str | None, joint: str | None) -> list[str]:
    r"""A sentence if the winner's pilot was too little ahead of that of joint training in the last rung that both had."""
    if None in (winner, joint) or winner == joint:
        return []
    pairs = zip(*(in_rungs(results[name]) for name in (winner, joint)), strict=False)
    found = [(number, *(distances(row).get("gFD") for row in rows)) for number, rows in enumerate(pairs, 1)]
    found = [(number, best, other) for number, best, other in found if best and other]
    if not found or found[-1][2] / found[-1][1] >= _TOLD_APART:
        return []
    number, best, other = found[-1]
    return [
        f"**`{winner}` and `{joint}` are not told apart**: gFD {best:.4g} and {other:.4g} in rung {number}. In our searches, differences "
        f"of pilots below a factor of {_TOLD_APART} did not last (`benchmarks/results/forecast.md`). Take either."
    ]


def autoencoders_decide(candidates: list[list[dict[str, Any]]]) -> bool:
    r"""Whether, in the last rung of most candidates, what the autoencoder loses is a large part of the distance of samples."""
    found = [distances(rows[-1]) for rows in candidates if rows and "failed" not in rows[-1]]
    shares = sorted(each["rFD"] / each["gFD"] for each in found if each.get("gFD") and "rFD" in each)
    return bool(shares) and shares[len(shares) // 2] > 1 / 3


def frontier(results: dict[str, list[dict[str, Any]]], winner: str | None) -> Figure:
    r"""rFD against the generator's own error (`gap`), a point for each candidate in its last rung."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, (name, rows) in enumerate(results.items()):
        found = map(distances, in_rungs(rows))
        whole = [each for each in found if "gap" in each]
        if whole:
            axis.scatter(
                whole[-1]["rFD"], whole[-1]["gap"], color=f"C{number % 10}", marker="*" if name == winner else "o",
                s=120 if name == winner else 40, label=name,
            )  # fmt: skip
    axis.set_xlabel("rFD ↓: what the autoencoder loses")
    axis.set_ylabel("gap ↓: samples to reconstructions")
    _legend(figure, axis)
    return figure


def curves(results: dict[str, list[dict[str, Any]]]) -> Figure:
    r"""gFD of each candidate over the steps of its generator."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for number, (name, rows) in enumerate(results.items()):
        points = [
            (row["rung"]["generator_steps"], distances(row)["gFD"])
            for row in rows
            if "failed" not in row and "gFD" in distances(row)
        ]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=f"C{number % 10}", label=name)
    if axis.lines:
        axis.set_xscale("log")
        axis.set_yscale("log")
    axis.set_xlabel("steps of the generator")
    axis.set_ylabel("gFD ↓")
    _legend(figure, axis)
    return figure


def _legend(figure: Figure, axis) -> None:
    if axis.get_legend_handles_labels()[0]:
        figure.legend(*axis.get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside right")


def grids_of(search: Search, results: dict[str, list[dict[str, Any]]]) -> list[tuple[str, Path]]:
    r"""Grids of reconstructions and of samples of each candidate, at its last rung that has them."""
    found = []
    for name in results:
        for kind in ("reconstructions", "samples"):
            paths = sorted(search.trial(name).folder.glob(f"rung-*/{kind}.png"))
            found += [(f"{name}: {kind}", path) for path in paths[-1:]]
    return found


def to_html(lines: list[str], pictures: list[tuple[str, bytes]]) -> str:
    r"""The lines of Markdown that this module writes, and pictures, as one file that needs no network."""
    parts, code, in_table = [], False, False
    for line in lines:
        if in_table and not line.startswith("|"):
            parts.append("</table>")
        starts, in_table = line.startswith("|") and not in_table, line.startswith("|")
        if line.startswith("```"):
            code = not code
            parts.append("<pre>" if code else "</pre>")
        elif code:
            parts.append(html.escape(line))
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            parts.append(f"<h{level}>{_inline(line[level:].strip())}</h{level}>")
        elif in_table and not line.startswith("|---"):
            cells = "".join(f"<td>{_inline(cell.strip())}</td>" for cell in line.strip("|").split("|"))
            parts.append(f"{'<table>' if starts else ''}<tr>{cells}</tr>")
        elif line and not in_table:
            parts.append(f"<p>{_inline(line)}</p>")
    for name, content in pictures:
        data = base64.b64encode(content).decode()
        parts.append(f'<h3>{html.escape(name)}</h3><img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    body = "\n".join(parts)
    return f'<!doctype html><meta charset="utf-8"><title>Which latent space?</title><style>{_STYLE}</style>\n{body}\n'


def _inline(text: str) -> str:
    """Bold and code of Markdown."""
    text = html.escape(text, quote=False)
    for mark, tag in (("**", "b"), ("`", "code")):
        parts = text.split(mark)
        text = "".join(part if number % 2 == 0 else f"<{tag}>{part}</{tag}>" for number, part in enumerate(parts))
    return text
