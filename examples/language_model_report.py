"""The figure and the sentence of language_model.py, from its JSON."""

from pathlib import Path

NAMES = {"linear_dm_loss": "linear_dm_loss", "cross_entropy": "materialised logits and cross entropy"}
COLORS = {"linear_dm_loss": "#1b6ca8", "cross_entropy": "#b03a2e"}


def draw(found: dict, path: Path) -> None:
    """Peak memory of each step on the left, the training loss on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (memory, loss) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    logits = found["logits_bytes"] / 2**30
    memory.axhline(logits, color="#666666", linestyle="--", linewidth=1)
    memory.annotate(
        f"the logits alone: {logits:.2f} GiB", (0.99, logits), xycoords=("axes fraction", "data"), ha="right", va="bottom"
    )
    for run in found["runs"]:
        steps = [record["step"] + 1 for record in run["steps"]]
        peaks = [record["peak_bytes"] / 2**30 for record in run["steps"]]
        memory.plot(steps, peaks, color=COLORS[run["loss"]], marker="o" if len(steps) < 10 else None, label=NAMES[run["loss"]])
        loss.plot(steps, [record["loss"] for record in run["steps"]], color=COLORS[run["loss"]])
    memory.set(xlabel="step", ylabel="peak of the whole process, GiB", ylim=(0, None))
    memory.legend(loc="center right", frameon=False)
    loss.set(xlabel="step", ylabel="training loss, nats a token")
    for axes in (memory, loss):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def text(found: dict) -> str:
    """What was measured, in a few lines."""
    lines = [
        f"{found['positions']} positions a step, 131072 classes: the logits alone take {found['logits_bytes'] / 2**20:.0f} MiB"
    ]
    for run in found["runs"]:
        peak = max(record["peak_bytes"] for record in run["steps"]) / 2**20
        seconds = sorted(record["seconds"] for record in run["steps"])[len(run["steps"]) // 2]
        lines.append(f"{NAMES[run['loss']]}: peak of the process {peak:.0f} MiB, {seconds:.2f} s a step (median)")
        if run["held_out_perplexity"] is not None:
            first, last = run["steps"][0]["loss"], run["steps"][-1]["loss"]
            lines.append(f"  loss {first:.2f} to {last:.2f}, held-out perplexity {run['held_out_perplexity']:.0f}")
    return "\n".join(lines)
