"""report.py - a page of a folder's results: index.html with plots and a table of all rows, no other files

    python3 bench/report.py [FOLDER]        default bench/results; needs matplotlib

Reads FOLDER/*.json as bench.h writes them. The first part of a row's `config` says whose it is when it is one of WHO;
else it is moe.h's. The page depends on the results alone.
"""
import glob
import html
import io
import json
import os
import re
import sys

import matplotlib
import matplotlib.ticker
from matplotlib.figure import Figure

WHO = ("moe.h", "torch", "triton", "vllm", "sglang")
COLOURS = {"moe.h": "#1f6feb", "torch": "#d9480f", "triton": "#2b8a3e", "vllm": "#862e9c", "sglang": "#c2255c"}
LOADS = {"one hot": "#1f6feb", "zipf": "#e8590c", "empty": "#868e96", "one local": "#2b8a3e"}
STYLE = """body { font: 15px/1.45 sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 12px } td, th { padding: 1px 8px; text-align: right }
th { position: sticky; top: 0; background: #eee } tr:nth-child(even) { background: #f6f6f6 }
td.t, th.t { text-align: left } svg { max-width: 100%; height: auto }"""


def read(folder):
    """(name, result) of each file, and all rows with file, chip, who, and of the config state and variant."""
    files, rows = [], []
    for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
        with open(path) as file:
            result = json.load(file)
        name = os.path.splitext(os.path.basename(path))[0]
        files.append((name, result))
        for row in result["rows"]:
            parts = [part for part in row["config"].split(", ") if part]
            named = parts != [] and parts[0] in WHO
            rest = " ".join(part for part in parts if part not in ("rested", "sustained"))
            # Behind a name come tiles, which differ from point to point of one line.
            row.update(file=name, chip=result["chip"], who=parts[0] if named else "moe.h",
                       state="sustained" if "sustained" in parts else "", variant="" if named else rest)
            rows.append(row)
    return files, rows


def panels(rows, key):
    """{key: rows}, in the order of first sight."""
    found = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def floors(rows):
    """us of a bare stream of the layer's bytes, where a row of the same chip, layer, load and tokens has it."""
    return {(r["chip"], r["layer"], r["load"], r["tokens"]): r["floor_us"] for r in rows if r.get("floor_us", 0) > 0}


def floor_of(row, known):
    return row.get("floor_us") or known.get((row["chip"], row["layer"], row["load"], row["tokens"]), 0)


def svg(figure, name):
    """The figure as text; `name` keeps its ids apart from other figures'."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    return re.sub(r"[ \t]+\n", "\n", text[text.index("<svg"):])


def grid(count):
    figure = Figure(figsize=(12, 3.6 * ((count + 2) // 3)), layout="constrained")
    return figure, [figure.add_subplot((count + 2) // 3, 3, i + 1) for i in range(count)]


def number(value, _=None):
    return f"{value:,.4g}" if value < 10000 else f"{value:,.0f}"


def draw_lines(groups, value, title, label, name):
    """A panel for each group, a line for each implementation: value(row) over tokens."""
    figure, axes = grid(len(groups))
    for ax, (key, rows) in zip(axes, groups.items()):
        lines = {}
        for r in rows:
            if value(r) > 0:
                lines.setdefault((r["who"], r["stage"], r["variant"], r["state"], r["file"]), []).append(r)
        names = [line[:4] for line in lines]
        for (who, stage, variant, state, file), points in lines.items():
            text = " ".join(filter(None, (who, stage if stage == "gemms" else "", variant, state)))
            if names.count((who, stage, variant, state)) > 1:
                text += f" ({file})"
            points.sort(key=lambda r: r["tokens"])
            ax.plot([r["tokens"] for r in points], [value(r) for r in points], label=text, color=COLOURS[who],
                    marker="os^v"[names.index((who, stage, variant, state)) % 4], markersize=4, linewidth=1.2,
                    linestyle=":" if stage == "gemms" else "--" if state or variant == "programmatic" else "-")
        tokens = sorted({r["tokens"] for r in rows})
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(matplotlib.ticker.FixedLocator(tokens[::max(1, len(tokens) // 6)]))
        ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(matplotlib.ticker.FuncFormatter(number))
            axis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set_title(title(key), fontsize=9)
        ax.set_xlabel("tokens", fontsize=8)
        ax.set_ylabel(label, fontsize=8)
        ax.tick_params(labelsize=7, which="both")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    return svg(figure, name)


def draw_loads(groups, known):
    """A panel for each layer of a file. Bars: time / stream of a load over that of the uniform load."""
    figure, axes = grid(len(groups))
    for ax, (key, rows) in zip(axes, groups.items()):
        times = {(r["load"], r["tokens"]): r["us"] / floor_of(r, known) for r in rows}
        tokens = sorted({t for load, t in times if load != "uniform"})
        loads = [load for load in LOADS if any(load == other for other, _ in times)]
        most = 0
        for i, load in enumerate(loads):
            at = [t for t in tokens if (load, t) in times]
            heights = [times[load, t] / times["uniform", t] for t in at]
            bars = ax.bar([tokens.index(t) + (i - (len(loads) - 1) / 2) * 0.38 for t in at], heights, 0.36, label=load,
                          color=LOADS[load])
            ax.bar_label(bars, fmt="%.2f", fontsize=7)
            most = max(most, *heights)
        ax.axhline(1, color="#222", linewidth=0.8)
        ax.axhline(1.15, color="#c92a2a", linewidth=0.8, linestyle="--")
        ax.set_ylim(0, max(1.45, 1.2 * most))
        ax.set_xticks(range(len(tokens)), [f"T {number(t)}" for t in tokens], fontsize=8)
        ax.tick_params(axis="y", labelsize=7)
        ax.set_title("%s\n%s %s" % key, fontsize=9)
        ax.legend(fontsize=7, ncols=2)
    return svg(figure, "loads")


def table(rows, known):
    heads = ["file", "layer", "format", "load", "stage", "config", "tokens", "us", "least", "most", "stream us",
             "us / stream", "TB/s", "TFLOPS"]
    out = ["<table><tr>" + "".join(f"<th{' class=t' if i < 6 else ''}>{h}</th>" for i, h in enumerate(heads)) + "</tr>"]
    for r in rows:
        floor = floor_of(r, known) if r["stage"] == "layer" else r.get("floor_us", 0)
        texts = [r["file"], r["layer"], r["format"], r["load"], r["stage"], r["config"]]
        values = [number(r["tokens"]), f"{r['us']:,.2f}", f"{r['us_min']:,.2f}", f"{r['us_max']:,.2f}",
                  f"{floor:,.2f}" if floor > 0 else "", f"{r['us'] / floor:.2f}" if floor > 0 else "",
                  number(r["bytes"] / r["us"] * 1e-6) if r.get("bytes") else "",
                  number(r["flops"] / r["us"] * 1e-6) if r.get("flops") else ""]
        out.append("<tr>" + "".join(f"<td class=t>{html.escape(t)}</td>" for t in texts)
                   + "".join(f"<td>{v}</td>" for v in values) + "</tr>")
    return "\n".join(out + ["</table>"])


def sources(files):
    out = ["<ul>"]
    for name, result in files:
        said = [result["chip"]] + [f"{key} {result[key]}" for key in ("driver", "torch", "triton", "commit", "date")
                                   if result.get(key)]
        said += [f"{key} {value}" for key, value in result.get("ceilings", {}).items()]
        out.append(f"<li><b>{html.escape(name)}</b>: {html.escape(', '.join(said))}</li>")
    return "\n".join(out + ["</ul>"])


def page(files, rows):
    known = floors(rows)
    layers = [r for r in rows if r["stage"] in ("layer", "gemms") and floor_of(r, known) > 0]
    uniform = [r for r in layers if r["load"] == "uniform"]
    skewed = {(r["file"], r["layer"], r["tokens"]) for r in layers if r["load"] != "uniform"}
    loads = [r for r in layers if (r["file"], r["layer"], r["tokens"]) in skewed
             and r["state"] == r["variant"] == ""]
    others = [r for r in rows if r["stage"] not in ("layer", "gemms") and r["tokens"] > 0]
    out = ["<!DOCTYPE html>", '<html lang="en"><head><meta charset="utf-8"><title>moe.h: measured</title>',
           f"<style>{STYLE}</style></head><body>", "<h1>moe.h: measured</h1>", sources(files)]
    if uniform:
        out += ["<h2>Layers: time / stream</h2>",
                "<p>Uniform load, logits to output. Stream: a bare read of the bytes that the layer needs (weights of "
                "the experts that have tokens, once; input and output) on the same machine; 1 is the least that memory "
                "allows, and with many tokens arithmetic decides. Dotted, \"gemms\": both products and the activation. "
                "From 1,024 tokens on the GPU has rested before each launch, or is in sustained work (dashed).</p>",
                draw_lines(panels(uniform, lambda r: (r["chip"], r["layer"], r["format"])),
                           lambda r: r["us"] / floor_of(r, known), lambda key: "%s\n%s %s" % key, "time / stream",
                           "layers")]
    if loads:
        out += ["<h2>Uneven loads</h2>",
                "<p>Time / stream over that of the uniform load. One hot: every token chooses expert 5 and others; "
                "zipf: expert e with 1 / (e + 1). Dashed: 1.15, the aim. A rank none of whose experts have tokens "
                "(empty), or one of them all (one local), has few bytes: launches and arithmetic decide there.</p>",
                draw_loads(panels(loads, lambda r: (r["file"], r["layer"], r["format"])), known)]
    if others:
        out += ["<h2>Stages</h2>",
                draw_lines(panels(others, lambda r: (r["chip"], r["layer"], r["stage"])), lambda r: r["us"],
                           lambda key: "%s\n%s, %s" % key, "us", "stages")]
    return "\n".join(out + ["<h2>All rows</h2>", table(rows, known), "</body></html>", ""])


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
    files, rows = read(folder)
    if not rows:
        sys.exit(f"{folder} has no results")
    path = os.path.join(folder, "index.html")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(page(files, rows))
    print(f"{path}: {len(files)} files, {len(rows)} rows")


if __name__ == "__main__":
    main()
